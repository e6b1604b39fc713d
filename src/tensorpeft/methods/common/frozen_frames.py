"""What the methods with frames have in common: whether these are trained too."""


def check_train(value: object) -> None:
    """Raise a `ValueError` unless it says what is trained of frames and cores."""
    if value not in ("all", "cores"):
        raise ValueError(f'train={value!r}: expected "all" (frames and cores) or "cores" (the frames are frozen).')
