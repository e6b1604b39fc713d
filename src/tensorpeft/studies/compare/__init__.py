"""``tensorpeft compare``: several methods on one recipe, with bounded steps or each at its own best learning rate."""
