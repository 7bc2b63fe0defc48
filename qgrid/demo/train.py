"""Train the embedded model: `python -m qgrid.demo.train --out qgrid/demo/model`.

The run resumes from its checkpoint when there is one, so the same command continues it.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from qgrid.demo import checkpoint, sensitivity
from qgrid.demo import tokenizer as tokenizers
from qgrid.demo.curriculum import Curriculum
from qgrid.demo.network import Network, Shape
from qgrid.demo.optimizer import optimizers
from qgrid.demo.rows import PROSE, Batch, Encoder, Row, flatten
from qgrid.demo.start import start_alike, start_looking_back

EMBEDDING_STD = 0.25  # large, so that words stay legible below what the layers add to them
LAST_NORM = 0.16  # small, because the embedding is the output matrix as well


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run; its length is in minutes, or in steps for an exact repeat."""

    out: Path
    work: Path
    minutes: float = 37.0
    steps: int | None = None
    tokens_per_step: int = 6_144
    matrix_lr: float = 0.012
    other_lr: float = 0.003
    warmup: float = 0.01  # share of the run
    decay_from: float = 0.6  # share of the run
    seed: int = 0
    threads: int = 2
    log_every: int = 50  # steps
    save_seconds: float = 120.0
    export_seconds: float = 600.0
    shape: Shape = field(default_factory=Shape)


def rate(progress: float, plan: Plan) -> float:
    """Share of the full learning rate: warm-up, plateau, linear decay to zero."""
    if progress < plan.warmup:
        return (progress + 1e-3) / (plan.warmup + 1e-3)
    return min(1.0, max(0.0, (1 - progress) / (1 - plan.decay_from)))


def fresh_network(plan: Plan, tokenizer: Tokenizer) -> Network:
    """Seeded initial weights."""
    torch.manual_seed(plan.seed)
    network = Network(replace(plan.shape, vocab=tokenizer.get_vocab_size()))
    for name, param in network.named_parameters():
        if param.ndim == 2:
            std = EMBEDDING_STD if "embed" in name else param.shape[1] ** -0.5
            torch.nn.init.normal_(param, std=std)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(param)
    torch.nn.init.constant_(network.model.norm.weight, LAST_NORM)
    start_alike(network, tokenizer)
    start_looking_back(network)
    return network


def prepare_thread() -> None:
    """One core a thread: threads that meet only once a step stand a busy machine best."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # sharp attention makes denormals, which are slow


def losses(network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss [predictions] and whether the likeliest token was right [predictions]."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        hidden = network(batch.ids, batch.positions, batch.segments)
        logits = network.logits(hidden[batch.scored]).float()
    loss = functional.cross_entropy(logits, batch.targets, reduction="none")
    return loss, logits.detach().argmax(-1) == batch.targets


@dataclass(frozen=True)
class Share:
    """What one thread found on its part of a batch."""

    gradients: tuple[Tensor, ...]
    loss: float  # nats, its part of the weighted mean over the whole batch
    prose_loss: float  # nats, summed
    num_prose: int  # tokens
    num_tokens: int
    kinds: list[tuple[str, int]]
    right: list[float]


def work(network: Network, batch: Batch, total_weight: float, end: int) -> Share:
    """Loss and gradients of one part of a batch whose loss weights sum to `total_weight`."""
    loss, right = losses(network, batch)
    mean = (loss * batch.weights).sum() / total_weight
    gradients = torch.autograd.grad(mean, list(network.parameters()))
    is_prose = torch.tensor([kind == PROSE for kind in batch.kinds])[batch.owners]
    return Share(
        gradients,
        float(mean.detach()),
        float(loss.detach()[is_prose].sum()),
        int(is_prose.sum()),
        len(batch.ids),
        batch.kinds,
        row_accuracy(batch, right, end),
    )


def split_evenly(rows: list[Row], parts: int) -> list[list[Row]]:
    """Rows dealt out by length, so that all parts take about as long."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    return [part for part in (ordered[i::parts] for i in range(parts)) if part]


def row_accuracy(batch: Batch, right: Tensor, end: int) -> list[float]:
    """Share of the scored tokens that each row got right, the end of a reply left out."""
    num_rows, counted = len(batch.kinds), (batch.targets != end).float()
    hits = torch.zeros(num_rows).index_add_(0, batch.owners, right.float() * counted)
    counts = torch.zeros(num_rows).index_add_(0, batch.owners, counted)
    return list((hits / counts.clamp(min=1)).tolist())


class Run:
    """A training run and its state."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        plan.work.mkdir(parents=True, exist_ok=True)
        self.pool = ThreadPoolExecutor(plan.threads, initializer=prepare_thread)
        self.tokenizer = self._tokenizer()
        self.network = fresh_network(plan, self.tokenizer)
        self.optimizers = optimizers(self.network, plan.matrix_lr, plan.other_lr)
        self.curriculum = Curriculum(Encoder(self.tokenizer), plan.seed)
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        self.prose_loss = 0.0
        self.stopping = False
        if self.checkpoint.exists():
            self.resume()

    @property
    def checkpoint(self) -> Path:
        """Where the run's state is kept."""
        return self.plan.work / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        return self.elapsed / (self.plan.minutes * 60)

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, learned once and kept beside the checkpoint."""
        path = self.plan.work / "tokenizer.json"
        if not path.exists():
            tokenizers.build().save(str(path))
        return Tokenizer.from_file(str(path))

    def save(self) -> None:
        """Write the checkpoint."""
        checkpoint.save(
            self.checkpoint,
            {
                "network": self.network.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "step": self.step,
                "tokens": self.tokens,
                "elapsed": self.elapsed,
                "num_documents": self.curriculum.num_documents,
                "accuracy": self.curriculum.accuracy,
                "prose_loss": self.prose_loss,
            },
        )

    def resume(self) -> None:
        """Continue where the checkpoint ends."""
        state = checkpoint.load(self.checkpoint)
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]
        self.prose_loss = state["prose_loss"]
        self.curriculum.num_documents = state["num_documents"]
        self.curriculum.accuracy.update(state["accuracy"])

    def train_step(self) -> float:
        """One batch, one update; the weighted mean loss in nats."""
        rows = self.curriculum.next_rows(self.plan.tokens_per_step, self.progress)
        encoder, total = self.curriculum.encoder, sum(sum(row.weights[1:]) for row in rows)
        jobs = [
            self.pool.submit(work, self.network, flatten(part, encoder.pad), total, encoder.end)
            for part in split_evenly(rows, self.plan.threads)
        ]
        shares = [job.result() for job in jobs]
        for param, *parts in zip(
            self.network.parameters(), *(share.gradients for share in shares), strict=True
        ):
            param.grad = torch.stack(parts).sum(0)
        self._update()
        self._observe(shares)
        return sum(share.loss for share in shares)

    def _observe(self, shares: list[Share]) -> None:
        """Count the step and follow its accuracies."""
        for share in shares:
            self.curriculum.observe(share.kinds, share.right)
            self.tokens += share.num_tokens
        prose = sum(s.prose_loss for s in shares) / max(1, sum(s.num_prose for s in shares))
        self.prose_loss += 0.05 * (prose - self.prose_loss)
        self.step += 1

    def _update(self) -> None:
        share = rate(self.progress, self.plan)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * share
            optimizer.step()
            optimizer.zero_grad()

    def report(self, loss: float) -> dict[str, Any]:
        """The figures of one log line."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.elapsed, 1),
            "progress": round(self.progress, 4),
            "loss": round(loss, 4),
            "prose_loss": round(self.prose_loss, 4),
            "accuracy": {
                name: [round(a, 3) for a in levels]
                for name, levels in self.curriculum.accuracy.items()
            },
        }

    def log(self, loss: float) -> None:
        """Append one line to the log."""
        with (self.plan.work / "log.jsonl").open("a") as file:
            file.write(json.dumps(self.report(loss)) + "\n")

    def export(self) -> None:
        """Write the model folder from the current weights, with the log so far."""
        checkpoint.export(self.network, self.tokenizer, self.plan.out)
        log = self.plan.work / "log.jsonl"
        if log.exists():
            checkpoint.write_aside(self.plan.out / "train_log.jsonl", log.read_text())

    def stop(self, *_: object) -> None:
        """End after the present step; the checkpoint keeps what is done."""
        self.stopping = True

    def train(self) -> None:
        """Train to the end, with log, checkpoints and exports on the way."""
        saved = exported = time.monotonic()
        loss = float("nan")
        while self.progress < 1 and not self.stopping:
            started = time.monotonic()
            loss = self.train_step()
            now = time.monotonic()
            self.elapsed += now - started
            if self.step % self.plan.log_every == 0:
                self.log(loss)
            if now - saved > self.plan.save_seconds:
                self.save()
                saved = now
            if now - exported > self.plan.export_seconds:
                self.export()
                exported = now
        self.log(loss)
        self.save()
        self.export()


def parse(arguments: list[str] | None = None) -> Plan:
    """The plan that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m qgrid.demo.train")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("outputs/demo_training"),
        help="folder of checkpoint and log",
    )
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    parser.add_argument("--steps", type=int, default=None, help="length in steps, not minutes")
    parser.add_argument("--threads", type=int, default=Plan.threads)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    return Plan(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> None:
    """Train as the command line asks."""
    plan = parse(arguments)
    prepare_thread()
    run = Run(plan)
    signal.signal(signal.SIGTERM, run.stop)
    run.train()
    if not run.stopping:
        sensitivity.main(["--model", str(plan.out), "--out", str(plan.out / "scores.json")])


if __name__ == "__main__":
    main()
