"""The platform's queue on this machine: workers behind it, and the HTTP that a deployed endpoint talks.

For batches on one's own machine and for tests. A client sees what https://docs.runpod.io documents of a queue-based
endpoint (run, runsync, status, stream, cancel, retry, health, purge-queue), and a worker what the SDK's loop asks for;
both on 127.0.0.1 only. All state is in memory and in unnamed files, gone with the process.

    with LocalPlatform() as platform:
        platform.start_worker(log=Path("worker.log"), environment=os.environ | {"MODEL": "draft"})
        httpx.post(f"{platform.url}/run", headers=platform.headers, json={"input": {"text": "Hello."}})

    limits.py     the documented limits, and this stand-in's own times
    spool.py      large JSON out of memory
    pulse.py      waiting for the next change
    jobs.py       one job and what a request for one may say
    endpoint.py   the queue: who has which job, and how each ends. No HTTP, no processes
    web.py        the HTTP of clients and of workers
    processes.py  workers' processes: replaced when they end, gone when this one is
    platform.py   all of it together, in a thread of its own
"""

from scripts.local_platform.limits import Limits
from scripts.local_platform.platform import LocalPlatform
from scripts.local_platform.processes import LocalWorker

__all__ = ["Limits", "LocalPlatform", "LocalWorker"]
