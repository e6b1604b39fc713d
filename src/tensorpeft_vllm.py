"""What vLLM imports in each of its processes where tensorpeft is installed: no more, unless a person asked for it."""

import os


def register() -> None:
    """Start the plug-in where TENSORPEFT_ADAPTERS names a folder (`tensorpeft.serving.register`)."""
    if os.environ.get("TENSORPEFT_ADAPTERS"):
        from tensorpeft import serving

        serving.register()
