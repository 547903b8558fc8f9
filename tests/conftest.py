"""What a worker of pytest-xdist (`make test`) finds, so that a test means there what it means alone."""
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")     # workers share the cores; read when torch is imported
    os.environ.pop("COLUMNS", None)                   # xdist tells its workers of a terminal that they do not have
