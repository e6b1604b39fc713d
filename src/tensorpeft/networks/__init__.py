"""Tensor networks in plain torch: no PEFT, no configuration, no model."""
