"""llama.cpp's own server (`python -m tests.servers.llama FILE PORT SLOTS CONTEXT`)."""

from __future__ import annotations

import sys
import threading


def main(path: str, port: str, slots: str, context: str) -> None:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = path
    wanted.model_alias = {"tiny"}
    wanted.hostnames = ["127.0.0.1"]
    wanted.port = int(port)
    wanted.n_parallel = int(slots)
    wanted.n_ctx = int(slots) * int(context)
    wanted.endpoint_metrics = True
    wanted.warmup = False
    server = xllamacpp.Server(wanted)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
