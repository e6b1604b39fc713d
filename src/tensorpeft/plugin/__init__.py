"""The only place that knows PEFT's internals: registration, the config base, the one tuner and the one layer."""
