"""From a name to a model: of the Hub, a folder, a GGUF file, or an installed package that carries one."""
