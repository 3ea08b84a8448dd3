"""`python -m harness.kubelet CONFIG`: runs inside the cluster's network namespace, until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

from harness.kubelet.api import Api
from harness.kubelet.config import load
from harness.kubelet.manager import Manager
from harness.kubelet.server import Server
from harness.kubelet.store import Store


async def main(config_file: Path) -> None:
    config = load(config_file)
    async with Api(config.server, config.ca_file, config.token) as api:
        manager = Manager(config, api, Store(api, Path(config.folder) / "hosts"))
        server = Server(config, manager)
        work = asyncio.gather(manager.run(), server.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            logging.info("ending; the kernel ends the containers with this process")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(main(Path(sys.argv[1])))
