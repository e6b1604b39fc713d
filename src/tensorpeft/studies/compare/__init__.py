"""``tensorpeft compare``: several methods on one recipe, each at its own best learning rate."""
