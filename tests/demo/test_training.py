"""A short real run learns, and one that was stopped continues as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from qgrid.demo import MODEL_DIR, checkpoint
from qgrid.demo.curriculum import Curriculum
from qgrid.demo.network import Network, Shape
from qgrid.demo.optimizer import orthogonalize
from qgrid.demo.problems import draw
from qgrid.demo.rows import Encoder, flatten, padded_length
from qgrid.demo.seeds import Split, document_rng
from qgrid.demo.tasks import TRAINED, conversation
from qgrid.demo.train import Plan, Run, losses, parse, rate

SMALL = Shape(vocab=0, hidden=64, inner=64, layers=2, heads=2, kv_heads=1, head_dim=32)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A run of twelve steps; the tokenizer is the shipped one."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "tokenizer.json").write_bytes((MODEL_DIR / "tokenizer.json").read_bytes())
    return Plan(
        out=tmp_path / "model", work=work, steps=12, tokens_per_step=1500, shape=SMALL, log_every=1
    )


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.network.state_dict().items()}


def test_a_short_run_lowers_the_loss(plan: Plan) -> None:
    run = Run(plan)
    found = [run.train_step() for _ in range(12)]
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_a_stopped_run_continues_identically(plan: Plan, tmp_path: Path) -> None:
    whole = Run(plan)
    for _ in range(6):
        whole.train_step()
    first = Run(plan)
    for _ in range(3):
        first.train_step()
    first.save()
    second = Run(plan)
    assert second.step == 3
    for _ in range(3):
        second.train_step()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name


def test_a_run_ends_with_an_export_that_loads(plan: Plan) -> None:
    run = Run(replace(plan, steps=2))
    run.train()
    network = checkpoint.read_network(plan.out)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, run.network.state_dict()[name].bfloat16().float()), name
    assert len((plan.work / "log.jsonl").read_text().splitlines()) == 3


def test_stop_ends_the_run_after_the_step_and_saves(plan: Plan) -> None:
    run = Run(plan)
    run.stop()
    run.train()
    assert run.step == 0
    assert run.checkpoint.exists()


def test_rate_rises_stays_and_falls_to_zero(plan: Plan) -> None:
    shares = [rate(progress / 100, plan) for progress in range(101)]
    assert shares[0] < 0.2 and shares[-1] == 0 and max(shares) == 1
    assert shares[30] == 1 and shares[80] == pytest.approx(0.5)


def test_command_line_names_the_folder() -> None:
    plan = parse(["--out", "there", "--steps", "5"])
    assert (plan.out, plan.steps, plan.minutes) == (Path("there"), 5, Plan.minutes)


@torch.no_grad()
def test_padding_and_neighbours_do_not_change_a_row() -> None:
    torch.manual_seed(0)
    encoder = Encoder(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")))
    network = Network(replace(SMALL, vocab=encoder.tokenizer.get_vocab_size()))
    problems = [
        draw(TRAINED[name], document_rng(Split.TRAIN, 5), 2, Split.TRAIN)
        for name in ("retrieval", "arithmetic", "structured")
    ]
    rows = [encoder.chat(conversation(problem), ("x", 1)) for problem in problems]
    together = losses(network, flatten(rows, encoder.pad))[0].sort().values
    alone = [losses(network, flatten([row], encoder.pad))[0] for row in rows]
    torch.testing.assert_close(together, torch.cat(alone).sort().values, atol=0.05, rtol=0.05)


def test_only_replies_carry_loss() -> None:
    encoder = Encoder(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")))
    row = encoder.chat([("user", "34+5="), ("assistant", "39")], ("arithmetic", 1))
    scored = [i for i, weight in zip(row.ids, row.weights, strict=True) if weight]
    assert scored == [*encoder.text("39"), encoder.end]


def test_lengths_are_padded_upwards() -> None:
    assert all(padded_length(n) >= n for n in range(1, 4097))


def test_lagging_levels_and_tasks_get_more() -> None:
    encoder = Encoder(Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")))
    curriculum = Curriculum(encoder)
    curriculum.accuracy["code"] = [0.9, 0.7, 0.1, 0.0, 0.0]
    shares = curriculum.level_shares("code", progress=0.0)
    assert shares[0] < shares[1] < shares[2] > 10 * shares[3]
    before = curriculum.task_shares(0.0)["code"]
    curriculum.accuracy["code"] = [0.9] * 5
    assert curriculum.task_shares(0.0)["code"] < before


def test_updates_of_muon_are_nearly_orthogonal() -> None:
    stack = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack))
    assert values.min() > 0.4 and values.max() < 1.4
