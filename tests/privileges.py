"""Programs that obey permissions, whoever runs the tests."""

import os
import shutil

import pytest


def unprivileged(*command: str) -> list[str]:
    """The command without root's right to read and write everything."""
    if os.geteuid() != 0:
        return list(command)
    if shutil.which("setpriv") is None:
        pytest.skip("root, and no setpriv to give up its rights")
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
