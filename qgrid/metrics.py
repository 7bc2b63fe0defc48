"""Every metric that qgrid reports: unit, which way is better, one sentence of definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a second run on the same machine gives, timings apart (docs/reproduce.md): the same number,
# one near it, or whatever the circumstances of the timing are.
Again = Literal["same", "near", "any"]
_TIMES = ("ms", "tok/s", "req/s")


@dataclass(frozen=True)
class Metric:
    """How one number is read."""

    unit: str
    better: Literal["higher", "lower", "neither"]
    title: str  # column head
    definition: str
    again: Again = "same"

    @property
    def is_timing(self) -> bool:
        """Whether it is a time or a rate, which a second run never gives again to the digit."""
        return self.unit in _TIMES


METRICS: dict[str, Metric] = {
    # quality
    "ppl": Metric(
        "1", "lower", "ppl", "Perplexity at the cell's context (protocol gptq-N or llamacpp-N)."
    ),
    "ln_ppl_ratio": Metric(
        "nats", "lower", "ln ppl ratio", "Mean paired difference of negative log-likelihood."
    ),
    "kld_mean": Metric(
        "nats", "lower", "KLD", "Mean over tokens of KL(baseline || cell), full vocabulary."
    ),
    "kld_topk_mean": Metric(
        "nats",
        "lower",
        "KLD top-k",
        "Mean KL(baseline || cell) over tokens in both top-k lists and one rest: a lower bound.",
    ),
    "kld_median": Metric("nats", "lower", "KLD median", "Median of the per-token KL divergence."),
    "kld_p90": Metric("nats", "lower", "KLD p90", "90th percentile of the per-token KL."),
    "kld_p95": Metric("nats", "lower", "KLD p95", "95th percentile of the per-token KL."),
    "kld_p99": Metric("nats", "lower", "KLD p99", "99th percentile of the per-token KL."),
    "kld_p999": Metric("nats", "lower", "KLD p99.9", "99.9th percentile of the per-token KL."),
    "kld_max": Metric("nats", "lower", "KLD max", "Largest per-token KL divergence."),
    "kld_floor": Metric(
        "nats", "lower", "KLD floor", "KL of the baseline at the speed dtype against itself."
    ),
    "same_top_p": Metric(
        "ratio",
        "higher",
        "same top",
        "Share of positions whose most likely token is the baseline's.",
    ),
    "delta_p_mean": Metric(
        "ratio", "higher", "dp", "Mean change of the probability of the true token."
    ),
    "delta_p_rms": Metric(
        "ratio", "lower", "dp rms", "Root mean square change of the true token's probability."
    ),
    "accuracy": Metric("ratio", "higher", "accuracy", "Share of a slice's items answered right."),
    "accuracy_delta": Metric(
        "ratio", "higher", "change", "Accuracy less the baseline's on the same items."
    ),
    "answer_logprob": Metric(
        "nats", "higher", "answer logprob", "Mean log-probability of the right answer."
    ),
    "answer_logprob_delta": Metric(
        "nats", "higher", "logprob change", "Mean paired change of the answer's log-probability."
    ),
    "flips_worse": Metric(
        "items", "lower", "worse", "Items that the baseline had right and the cell has wrong."
    ),
    "flips_better": Metric(
        "items", "higher", "better", "Items that the baseline had wrong and the cell has right."
    ),
    "mcnemar_p": Metric(
        "1", "neither", "p", "Exact one-sided McNemar p of the flips for the worse."
    ),
    "failed_items": Metric(
        "items",
        "lower",
        "no answer",
        "Items that a server gave no answer to; kept out of the rest.",
    ),
    # size and memory
    "size_on_disk_bytes": Metric("bytes", "lower", "size", "Bytes of all files of the artifact."),
    "bits_per_weight": Metric(
        "bits", "lower", "bpw", "All stored weight bits over all parameters."
    ),
    "linear_bits_per_weight": Metric(
        "bits", "lower", "linear bpw", "Stored bits of the decoder's linears, scales included."
    ),
    "resident_weights_bytes": Metric(
        "bytes", "lower", "weights", "Bytes of weights in memory while the engine computes."
    ),
    "kv_bytes_per_token": Metric("bytes", "lower", "KV/token", "Bytes of KV cache a token takes."),
    "peak_memory_bytes": Metric(
        "bytes", "lower", "peak", "Highest memory of the speed stage above its start.", again="near"
    ),
    "kv_pool_bytes": Metric(
        "bytes",
        "neither",
        "KV pool",
        "Bytes that the engine sets aside for KV cache.",
        again="near",
    ),
    "activation_peak_bytes": Metric(
        "bytes",
        "lower",
        "activations",
        "Highest memory of activations, as the engine found it.",
        again="near",
    ),
    "reserved_bytes": Metric(
        "bytes",
        "neither",
        "reserved",
        "All memory that the engine reserves, needed or not.",
        again="near",
    ),
    "max_concurrency": Metric(
        "requests",
        "higher",
        "in pool",
        "Requests of the cell's context that the KV pool holds.",
        again="near",
    ),
    # speed
    "prefill_throughput": Metric(
        "tok/s",
        "higher",
        "prefill",
        "Prompt tokens over time in which a request waits for a token.",
    ),
    "decode_throughput": Metric(
        "tok/s", "higher", "decode", "Tokens over time in which no request waits for its first."
    ),
    "output_throughput": Metric(
        "tok/s", "higher", "output", "Output tokens over the time from first send to last token."
    ),
    "total_throughput": Metric(
        "tok/s", "higher", "total", "Prompt and output tokens over the same time."
    ),
    "request_throughput": Metric(
        "req/s", "higher", "requests", "Requests that did not fail over the same time."
    ),
    "goodput": Metric(
        "req/s", "higher", "goodput", "Requests inside all that is promised over the same time."
    ),
    "failed_requests": Metric(
        "requests", "lower", "failed", "Requests without a whole answer; in no other figure."
    ),
    "ttft_ms": Metric("ms", "lower", "TTFT", "Time from request to first token."),
    "itl_ms": Metric("ms", "lower", "ITL", "Time between two tokens of one request."),
    "tpot_ms": Metric("ms", "lower", "TPOT", "(latency - TTFT) / (output tokens - 1)."),
    "e2e_latency_ms": Metric("ms", "lower", "latency", "Time from request to last token."),
    "ttft_p90_ms": Metric("ms", "lower", "TTFT p90", "90th percentile of the TTFT."),
    "ttft_p99_ms": Metric("ms", "lower", "TTFT p99", "99th percentile of the TTFT."),
    "itl_p90_ms": Metric("ms", "lower", "ITL p90", "90th percentile of the ITL."),
    "itl_p99_ms": Metric("ms", "lower", "ITL p99", "99th percentile of the ITL."),
    "tpot_p90_ms": Metric("ms", "lower", "TPOT p90", "90th percentile of the TPOT."),
    "tpot_p99_ms": Metric("ms", "lower", "TPOT p99", "99th percentile of the TPOT."),
    "e2e_latency_p90_ms": Metric("ms", "lower", "latency p90", "90th percentile of the latency."),
    "e2e_latency_p99_ms": Metric("ms", "lower", "latency p99", "99th percentile of the latency."),
    "timing_cv": Metric(
        "ratio",
        "lower",
        "cv",
        "Coefficient of variation of decode throughput over repeats.",
        again="any",
    ),
    "merged_first_tokens": Metric(
        "ratio",
        "lower",
        "merged",
        "Share of requests whose first two tokens came in one read.",
        again="any",
    ),
    "knee_concurrency": Metric(
        "users",
        "higher",
        "knee",
        "Measured concurrency with the most throughput per latency.",
        again="any",
    ),
    "max_users": Metric(
        "users",
        "higher",
        "users",
        "Most concurrent users with 90 % of requests as promised.",
        again="any",
    ),
    "kv_usage_peak": Metric(
        "ratio",
        "lower",
        "KV used",
        "Highest share of its KV pool that the server reported.",
        again="any",
    ),
    "queue_peak": Metric(
        "requests",
        "lower",
        "queue",
        "Most requests that the server reported as waiting.",
        again="any",
    ),
    "client_processors": Metric(
        "1", "lower", "client", "Processors that the load generator itself kept busy.", again="any"
    ),
    "busy_elsewhere": Metric(
        "1",
        "lower",
        "others",
        "Processors that the timing wanted and other processes kept busy.",
        again="any",
    ),
    # cost
    "usd_per_million_output_tokens": Metric(
        "USD",
        "lower",
        "$/M output",
        "Price list: (prompt tokens x input + output tokens x output price) / output tokens.",
    ),
}
