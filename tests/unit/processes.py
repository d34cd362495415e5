"""Two processes that train together, as `accelerate launch` would start them."""

import os
import socket
import subprocess
import sys


def start_two(script: str) -> list[subprocess.Popen]:
    """Start a script twice, as ranks 0 and 1 of one group on the CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(port))
    common |= dict(WORLD_SIZE="2", OMP_NUM_THREADS="1", DLM_DEVICE="cpu")
    return [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=dict(common, RANK=rank, LOCAL_RANK=rank),
            stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]


def wait_for(processes: list[subprocess.Popen]) -> None:
    """Wait until all have ended well; else fail with what they said."""
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], b"".join(errors).decode()
