"""No library reports home on our behalf. What the user has set stays as it is."""

import os

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
}


def switch_off() -> None:
    """Set what is not set; before the libraries are imported, which read it only once."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
