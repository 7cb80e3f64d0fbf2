"""The generator on processors with other vector instructions than this one's."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("generator_gradients.py")


def heap_checks():
    """Environment in which the C library aborts as soon as it finds memory that was written out of bounds."""
    library = "libc_malloc_debug.so.0"
    try:
        ctypes.CDLL(library)
    except OSError:  # another C library, or glibc before 2.34
        return {}
    return {"LD_PRELOAD": library, "GLIBC_TUNABLES": "glibc.malloc.check=3"}


@pytest.mark.slow
def test_gradients_are_those_of_float64_and_memory_stays_intact_without_avx_512():
    environment = os.environ | heap_checks() | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert ", 0 wrong:" in run.stdout
