"""What a process does with the cores and the memory of its machine."""
from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import weakref

import pytest

from tests.conftest import ROOT
from utils.data.loader import frozen_objects


def python(program: str) -> list[str]:
    """What a program prints, in words."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "nice"), reason="needs priorities of processes")
def test_workers_give_way_to_a_model_on_the_same_cores():
    before, gpu, cpu = map(int, python("""
import os
from utils.data.loader import _start_worker
print(os.nice(0))
for polite in (False, True):
    _start_worker(None, polite, 0)
    print(os.nice(0))
"""))
    assert before == gpu < cpu


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_cpu_keeps_freed_memory_for_the_next_step():
    """Pages of 4 KB that the system hands out for 64 MB: thousands at first, none in the end, where they were kept."""
    first, *later = map(int, python("""
import resource, torch
from utils.device import select_device
select_device("cpu")
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""))
    assert sorted(later[-9:])[4] < 100 < first


def test_what_an_earlier_run_leaves_is_not_kept():
    class Run:
        pass

    run = Run()
    run.hooks = [run]
    left = weakref.ref(run)
    del run
    with frozen_objects():
        assert left() is None and gc.get_freeze_count()
    assert not gc.get_freeze_count()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_a_collection_leaves_the_memory_that_workers_share():
    """KB that a full collection copies while there is a fork: many, and hardly any with frozen objects."""
    frozen, free = map(int, python("""
import gc, os, re, signal
from contextlib import nullcontext
from utils.data.loader import frozen_objects

def private():
    return int(re.search(r"Private_Dirty: +([0-9]+)", open("/proc/self/smaps_rollup").read())[1])

for context in (frozen_objects, nullcontext):
    gc.collect()
    with context():
        if not (child := os.fork()):
            signal.pause()
        before = private()
        gc.collect()
        print(private() - before)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""))
    assert frozen < free / 5 and free > 5000
