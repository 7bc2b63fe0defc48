"""How a cluster of a test is laid out, and the files that say so to Slurm."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")  # character devices, as a GPU is
MUNGE = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "log-file": "munge.log",
    "pid-file": "munge.pid",
    "seed-file": "munge.seed",
}


@dataclass(frozen=True)
class Node:
    """A node as configured. `gpus` are of one kind, `gpu`."""

    name: str
    gpu: str
    gpus: int = 2
    cpus: int = 16
    memory_mib: int = 65536
    features: tuple[str, ...] = ()


NODES = (
    Node("n1", "alpha", features=("big",)),
    Node("n2", "alpha"),
    Node("n3", "beta"),
)


@dataclass(frozen=True)
class Layout:
    """What a test may want otherwise; `extra` are further lines of `slurm.conf`."""

    nodes: tuple[Node, ...] = NODES
    max_array_size: int = 1001
    preemption: bool = False  # partitions `urgent` and, as default, `spare`, which gives way to it
    lost_seconds: int = 10  # after which a silent node is down
    grace_seconds: int = 5  # from SIGTERM to SIGKILL
    extra: tuple[str, ...] = ()


PLAIN = Layout()


def write(folder: Path, layout: Layout) -> None:
    """Write the configuration, the key of munge and the folders of the daemons."""
    ports = _free_ports(2 + len(layout.nodes))
    (folder / "slurm.conf").write_text("\n".join([*_general(folder, layout, ports), ""]))
    (folder / "gres.conf").write_text("".join(_gres(node) for node in layout.nodes))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    for name in ("state", *(f"spool.{node.name}" for node in layout.nodes)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)


def _general(folder: Path, layout: Layout, ports: Sequence[int]) -> Iterator[str]:
    user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()
    yield from f"""\
ClusterName=qgrid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder / MUNGE["socket"]}
StateSaveLocation={folder / "state"}
SlurmdSpoolDir={folder / "spool.%n"}
SlurmctldPidFile={folder / "slurmctld.pid"}
SlurmdPidFile={folder / "slurmd.%n.pid"}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=sched_min_interval=10000,sched_interval=1,bf_interval=1,batch_sched_delay=0
MaxArraySize={layout.max_array_size}
MaxJobCount=20000
MinJobAge=300
KillWait={layout.grace_seconds}
SlurmdTimeout={layout.lost_seconds}
ReturnToService=2
InactiveLimit=0
MessageTimeout=20""".splitlines()
    yield from layout.extra
    for node, port in zip(layout.nodes, ports[2:], strict=True):
        feature = f" Feature={','.join(node.features)}" if node.features else ""
        yield (
            f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            f" CPUs={node.cpus} RealMemory={node.memory_mib}"
            f" Gres=gpu:{node.gpu}:{node.gpus}{feature}"
        )
    yield from _partitions(layout)


def _partitions(layout: Layout) -> list[str]:
    everywhere = "Nodes=ALL MaxTime=INFINITE State=UP DefMemPerCPU=64"
    if not layout.preemption:
        return [f"PartitionName=main {everywhere} Default=YES"]
    return [
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        f"PartitionName=spare {everywhere} Default=YES PriorityTier=1",
        f"PartitionName=urgent {everywhere} PriorityTier=10 PreemptMode=OFF",
    ]


def _gres(node: Node) -> str:
    lines = (
        f"NodeName={node.name} Name=gpu Type={node.gpu} File={device}\n"
        for device in DEVICES[: node.gpus]
    )
    return "".join(lines)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
