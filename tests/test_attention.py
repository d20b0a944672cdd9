"""Kernels for a GPU, as far as a CPU can tell: what goes into them and what is made of it, how they are chosen, and what is said if not.

FlexAttention runs as it is, without its compiler. Of `varlen` all is real but torch's flash kernel itself: `Flash` stands in for it,
takes what that takes, and refuses what that refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from rayward import attention
from rayward.attention import KERNELS, Row, Way, flex, over_mask, row_of, varlen
from rayward.attention.proof import GROUPS, Shape, against_masks
from rayward.batching import BatchSettings, collate, micro_batches
from rayward.errors import ModelError, SettingsError
from rayward.rendering import Group
from rayward.reward_model import RewardModel, score_groups
from rayward.reward_model.bodies import body_of, use_segments
from rayward.reward_model.kernels import choose_kernel, every_worker, heads_of
from rayward.sharding import shard
from tiny import classifier, plain_scores, random_group

torch.set_num_threads(1)
CPU = torch.device("cpu")
ANSWER = st.sampled_from([1, 2, 17, 90, 128, 300])  # tokens
SHAPE = Shape(4, 2, 16, 16)
ROWS = {
    "one answer": [(5, 7)],
    "one prompt of three": [(40, 30, 1, 20)],
    "no prompt": [(0, 9, 4), (0, 3)],
    "prompts alone": [(6,), (4,)],
    "several groups over several blocks": [(150, 140, 30), (3, 200, 5, 6), (1, 1), (0, 2, 2), (60, 10)],
}


class Flash:
    """aten::_flash_attention_forward and _backward for sequences of varying length, in plain torch, asking of arguments what they ask."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, bool]] = []  # which, how many sequences, causal

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], most: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        assert q.ndim == k.ndim == v.ndim == 3
        assert q.shape[1] % k.shape[1] == 0
        assert k.shape == v.shape
        assert q.dtype == k.dtype == v.dtype
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        for ends_N, rows, longest in zip(ends, (q, k), most, strict=True):
            assert ends_N.dtype == torch.int32
            assert ends_N.is_contiguous()
            assert (int(ends_N[0]), int(ends_N[-1]), int(ends_N.diff().max())) == (0, len(rows), longest)
        bounds = [ends_N.tolist() for ends_N in ends]
        assert len(bounds[0]) == len(bounds[1])
        for a, b, c, d in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
            yield slice(a, b), slice(c, d)

    @staticmethod
    def _weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        """logit_HQK."""
        logit = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        assert not causal or len(q) == len(k)
        return logit.masked_fill(torch.ones_like(logit[0]).triu(1).bool(), -torch.inf) if causal else logit

    def forward(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *rest: Any, scale: float) -> tuple[Tensor, ...]:
        dropout, causal, debug = rest
        assert not dropout
        assert not debug
        self.calls.append(("forward", len(cu_q) - 1, causal))
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        for at, seen in self._blocks(q, k, v, (cu_q, cu_k), (max_q, max_k)):
            logit = self._weights(q[at].float(), k[seen].float(), causal, scale)
            lse[:, at] = logit.logsumexp(-1)
            values = v[seen].float().repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[at] = torch.einsum("hqk,khd->qhd", logit.softmax(-1), values).to(q.dtype)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *rest: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dropout, causal, state, _ = rest
        assert not dropout
        assert state.dtype == torch.uint64
        assert grad.shape == out.shape == q.shape
        assert lse.shape == (q.shape[1], len(q))
        assert lse.dtype == torch.float32
        self.calls.append(("backward", len(cu_q) - 1, causal))
        dq, dk, dv = (torch.zeros(t.shape) for t in (q, k, v))
        each = q.shape[1] // k.shape[1]
        for at, seen in self._blocks(q, k, v, (cu_q, cu_k), (max_q, max_k)):
            weight = (self._weights(q[at].float(), k[seen].float(), causal, scale) - lse[:, at].unsqueeze(-1)).exp()
            d_out, values = grad[at].float(), v[seen].float().repeat_interleave(each, 1)
            d_weight = torch.einsum("qhd,khd->hqk", d_out, values) - (d_out * out[at].float()).sum(-1).T.unsqueeze(-1)
            d_logit = weight * d_weight * scale
            dq[at] = torch.einsum("hqk,khd->qhd", d_logit, k[seen].float().repeat_interleave(each, 1))
            dk[seen] = torch.einsum("hqk,qhd->khd", d_logit, q[at].float()).unflatten(1, (-1, each)).sum(2)
            dv[seen] = torch.einsum("hqk,qhd->khd", weight, d_out).unflatten(1, (-1, each)).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    made = Flash()
    monkeypatch.setattr(varlen, "_forward", made.forward)
    monkeypatch.setattr(varlen, "_backward", made.backward)
    return made


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> attention.Attend:
    """FlexAttention without its compiler; torch computes gradients with it on a CPU too, and refuses to since the compiled one cannot."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *given: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    return lambda q, k, v, row, scale: flex.run(torch_flex.flex_attention, q, k, v, row, scale)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Kernels by name, as all that there are, and as if made for a CPU."""

    def put(**kernels: attention.Attend) -> None:
        for name in list(KERNELS):
            monkeypatch.delitem(KERNELS, name)
        for name, attend in kernels.items():
            monkeypatch.setitem(KERNELS, name, Way(attend, "cpu"))

    return put


def numbers(attend: attention.Attend, row: Row, precision: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    T = len(row.own_T)
    q, k, v, way = (torch.randn(1, T, heads, 16).to(precision).transpose(1, 2).requires_grad_() for heads in (4, 2, 2, 4))
    out = attend(q, k, v, row, 0.3)
    assert out.shape == (1, T, 4, 16)
    return [out.detach(), *torch.autograd.grad((out * way.transpose(1, 2)).sum(), (q, k, v))]


# ----------------------------------------------------------------------------------------------------------- kernels alone


@pytest.mark.parametrize("kind", ROWS)
def test_varlen_says_what_masks_say(kind: str, flash: Flash) -> None:
    row = row_of(ROWS[kind])
    for said, exact in zip(numbers(varlen.attend, row, torch.float32), numbers(over_mask, row, torch.float32), strict=True):
        assert torch.allclose(said, exact, atol=2e-5)


def test_varlen_is_two_calls_forward_and_two_backward_however_many_groups(flash: Flash) -> None:
    numbers(varlen.attend, row_of([(4, 3, 2), (2, 5, 1, 1), (3, 2)]), torch.bfloat16)
    assert flash.calls == [("forward", 6, True), ("forward", 2, False), ("backward", 6, True), ("backward", 2, False)]


def test_varlen_calls_torch_as_torch_wants_it() -> None:
    """On the meta device the real operators take the call, with all its arguments, and give shapes."""
    row = row_of([(40, 30, 20), (5, 6)]).to("meta")
    q, k, v = (torch.empty(1, 101, heads, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    out = varlen.attend(q, k, v, row, 0.1)
    out.sum().backward()
    assert (out.shape, out.dtype) == ((1, 101, 4, 64), torch.bfloat16)
    assert q.grad is not None
    assert k.grad is not None
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)


@pytest.mark.parametrize("kind", ["no prompt", "several groups over several blocks"])
def test_flex_says_what_masks_and_segments_say(kind: str, eager: attention.Attend) -> None:
    row = row_of(ROWS[kind])
    made = [numbers(attend, row, torch.float32) for attend in (eager, over_mask, KERNELS["segments"].attend)]
    for said, exact, segments in zip(*made, strict=True):
        assert torch.allclose(said, exact, atol=2e-5)
        assert torch.allclose(said, segments, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(groups=st.lists(st.tuples(st.sampled_from([0, 1, 17, 128, 300]), st.lists(ANSWER, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_blocks_of_flex_are_those_of_the_mask(groups: list[tuple[int, list[int]]]) -> None:
    """Against the dense mask cut into blocks: which hold anything, and which hold everything."""
    row = row_of([prompt, *answers] for prompt, answers in groups)
    T = len(row.own_T)
    N = -(-T // flex.BLOCK)
    cut = torch.nn.functional.pad(row.mask_TT(), (0, N * flex.BLOCK - T) * 2).unflatten(1, (N, -1)).unflatten(0, (N, -1)).transpose(1, 2)
    any_NN, all_NN = flex.seen_blocks(row)
    assert torch.equal(any_NN, cut.flatten(2).any(-1))
    assert torch.equal(all_NN, cut.flatten(2).all(-1))
    mask = flex.block_mask(row)
    assert torch.equal(mask.kv_num_blocks[0, 0], (any_NN & ~all_NN).sum(-1).int())
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.full_kv_num_blocks[0, 0], all_NN.sum(-1).int())


def test_a_row_that_moves_takes_all_of_it_along() -> None:
    row = row_of(GROUPS).to("meta")
    tensors = [t for part in (row, row.own, row.across) for t in part.__dict__.values() if isinstance(t, Tensor)]
    assert len(tensors) == 11
    assert {t.device.type for t in tensors} == {"meta"}


# ------------------------------------------------------------------------------------------------------------------- proof


def sees_too_much(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    """One token of 1,124 sees one key that is not its own."""
    mask = row.mask_TT()
    mask[700, 2] = True
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


WRONG: dict[str, tuple[attention.Attend, str]] = {
    "all is causal": (
        lambda q, k, v, row, scale: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2),
        "its outputs are off",
    ),
    "one key too many": (sees_too_much, "its outputs are off"),
    "no scale": (lambda q, k, v, row, scale: over_mask(q, k, v, row, 1.0), "its outputs are off"),
    "no numbers": (lambda q, k, v, row, scale: over_mask(q, k, v, row, scale) * torch.nan, "its outputs are off by nan"),
    "keys without gradients": (
        lambda q, k, v, row, scale: over_mask(q, 2 * k.detach() - k, v, row, scale),
        "its gradients of k are off",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_wrong_is_seen(kind: str, precision: torch.dtype) -> None:
    attend, said = WRONG[kind]
    assert said in against_masks(attend, SHAPE, CPU, precision)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_right_passes(precision: torch.dtype, flash: Flash) -> None:
    assert against_masks(varlen.attend, SHAPE, CPU, precision) == ""
    assert against_masks(KERNELS["segments"].attend, SHAPE, CPU, precision) == ""


def test_what_cannot_run_is_told_in_one_line() -> None:
    """Torch has no flash kernel of varying lengths for a CPU, and says so itself."""
    why = against_masks(varlen.attend, SHAPE, CPU, torch.bfloat16)
    assert why.startswith("NotImplementedError: Could not run 'aten::_flash_attention_forward'")
    assert "\n" not in why


def test_a_proof_changes_no_random_numbers_and_runs_where_nothing_is_kept() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert against_masks(KERNELS["segments"].attend, SHAPE, CPU, torch.float32) == ""
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------------ bodies


def mixed() -> list[Group]:
    rng = np.random.default_rng(1)
    return [random_group(rng, int(p), [int(a), 3, int(p)], [2, 1, 1]) for p, a in rng.integers(2, 20, (9, 2))]


def gradients(model: RewardModel, flat: bool) -> list[Tensor]:
    model.zero_grad()
    for _, batch in micro_batches(mixed(), BatchSettings(), shared=True, flat=flat):
        (model(batch).tanh() * batch.mask_GK).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox", "gpt2"])
def test_bodies_score_by_varlen_as_separate_sequences(kind: str, flash: Flash, on_cpu: Callable[..., None]) -> None:
    quiet = {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop") if kind == "gpt2"}
    body = classifier(kind, **quiet)
    model = RewardModel(body)
    on_cpu(varlen=varlen.attend)
    assert model.flat
    flash.calls.clear()
    groups = mixed()
    for score, group in zip(score_groups(model, groups, BatchSettings()), groups, strict=True):
        assert score.tolist() == pytest.approx(plain_scores(body, group), abs=1e-5)
    assert flash.calls
    for masked, said in zip(gradients(model, flat=False), gradients(model, flat=True), strict=True):
        assert (masked - said).abs().max() <= 1e-4 * masked.abs().max().clamp(min=1e-2)


@pytest.mark.parametrize("kind", ["qwen3"])
def test_bodies_score_by_flex_as_separate_sequences(kind: str, eager: attention.Attend, on_cpu: Callable[..., None]) -> None:
    quiet = {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop") if kind == "gpt2"}
    body = classifier(kind, **quiet)
    model = RewardModel(body)
    on_cpu(flex=eager)
    assert model.kernel_in(torch.float32) is eager
    groups = mixed()[:4]
    for score, group in zip(score_groups(model, groups, BatchSettings()), groups, strict=True):
        assert score.tolist() == pytest.approx(plain_scores(body, group), abs=1e-5)


def test_bf16_goes_by_varlen_too(flash: Flash, on_cpu: Callable[..., None]) -> None:
    model = RewardModel(classifier("qwen3"))
    on_cpu(varlen=varlen.attend)
    exact, rounded = (score_groups(model, mixed(), BatchSettings(), precision) for precision in ("fp32", "bf16"))
    gap = np.concatenate(exact) - np.concatenate(rounded)
    assert 0 < np.abs(gap).max() < 0.1 * np.concatenate(exact).std() + 0.1
    assert set(model._kernels) == {("cpu", torch.float32, False), ("cpu", torch.bfloat16, False)}


# ------------------------------------------------------------------------------------------------------------------ choice


def breaks(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def test_auto_takes_the_next_and_says_why_once(capsys: pytest.CaptureFixture[str], on_cpu: Callable[..., None]) -> None:
    model = RewardModel(classifier("qwen3"))
    on_cpu(varlen=breaks, flex=over_mask)
    assert model.flat
    score_groups(model, mixed(), BatchSettings(), "fp32")
    assert model.kernel_in(torch.float32) is over_mask
    assert capsys.readouterr().err == (
        "attention on cpu in float32 is flex: varlen was not taken, RuntimeError: no kernel image is available\n"
    )


def test_auto_goes_back_to_masks_where_nothing_is_right(capsys: pytest.CaptureFixture[str], on_cpu: Callable[..., None]) -> None:
    body = classifier("qwen3")
    model = RewardModel(body)
    on_cpu(varlen=breaks, flex=WRONG["all is causal"][0])
    assert not model.flat
    [group, *_] = mixed()
    assert score_groups(model, [group], BatchSettings())[0].tolist() == pytest.approx(plain_scores(body, group), abs=1e-5)
    told = capsys.readouterr().err
    assert told.startswith("attention on cpu in float32 is mask: varlen was not taken, RuntimeError")
    assert "; flex was not taken, its outputs are off by" in told
    assert told.count("\n") == 1


def test_a_kernel_that_is_wrong_in_the_body_alone_is_seen(capsys: pytest.CaptureFixture[str], on_cpu: Callable[..., None]) -> None:
    """Right on the row that it is shown alone, and no other."""
    shown = sum(map(sum, GROUPS))
    body = classifier("qwen3")
    assert use_segments(body)
    on_cpu(flex=lambda *given: (over_mask if given[0].shape[2] == shown else WRONG["all is causal"][0])(*given))
    assert choose_kernel(body, "auto", CPU, torch.float32) is None
    assert "flex was not taken, its hidden states are off" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_a_kernel_that_is_named_and_does_not_run_here_ends_training(name: Any) -> None:
    model = RewardModel(classifier("qwen3"), attend_by=name).train()
    with pytest.raises(SettingsError, match=rf"net.attention={name}: it does not run on cpu in float32\n  -> leave net.attention out"):
        _ = model.flat


def test_a_kernel_that_is_named_and_wrong_ends_training(on_cpu: Callable[..., None]) -> None:
    model = RewardModel(classifier("qwen3"), attend_by="varlen").train()
    on_cpu(varlen=breaks, flex=over_mask)
    with pytest.raises(SettingsError, match=r"net.attention=varlen: RuntimeError: no kernel image"):
        _ = model.flat


def test_scores_elsewhere_than_training_do_without_the_kernel_that_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A model trained on GPUs is calibrated by the process that started the run, which may have none."""
    body = classifier("qwen3")
    model = RewardModel(body, attend_by="varlen").eval()
    [group, *_] = mixed()
    assert score_groups(model, [group], BatchSettings())[0].tolist() == pytest.approx(plain_scores(body, group), abs=1e-5)
    assert capsys.readouterr().err == "attention on cpu in float32 is segments: varlen was not taken, it does not run on cpu in float32\n"


def test_masks_by_setting() -> None:
    model = RewardModel(classifier("qwen3"), attend_by="mask")
    assert not model.flat
    assert model.classifier.config._attn_implementation == "sdpa"


def test_a_body_that_keeps_to_masks_refuses_a_named_kernel() -> None:
    with pytest.raises(ModelError, match=r"net\.attention=flex is about packed rows, and this body keeps to masks"):
        RewardModel(classifier("gemma2"), attend_by="flex")


def test_segments_on_a_cpu_are_not_tried_twice() -> None:
    """The body was run with them when it was loaded; a model of billions of weights is not run again."""
    model = RewardModel(classifier("qwen3"))
    runs: list[Any] = []
    body_of(model.classifier).register_forward_pre_hook(lambda *given: runs.append(given))
    assert model.flat
    assert not runs


def test_a_body_is_left_as_it_was(on_cpu: Callable[..., None]) -> None:
    model = RewardModel(classifier("qwen3")).train()
    on_cpu(flex=over_mask)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    assert model.flat
    assert model.classifier.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert not model.classifier.get_input_embeddings()._forward_hooks


def test_a_spread_body_is_not_run_to_prove_a_kernel(on_cpu: Callable[..., None]) -> None:
    """All workers would have to, equally often, and one whose kernel breaks would leave the others waiting."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = RewardModel(classifier("qwen3"))
        shard(body_of(model.classifier), CPU, bf16=False)
        runs: list[Any] = []
        body_of(model.classifier).register_forward_pre_hook(lambda *given: runs.append(given))
        on_cpu(varlen=breaks, flex=over_mask)
        assert model.flat
        assert not runs
        assert len(model(collate([mixed()], shared=True))) == 9
    finally:
        dist.destroy_process_group()


def _asks(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert not every_worker(rank == 0, CPU)
    assert every_worker(True, CPU)
    dist.destroy_process_group()


@pytest.mark.slow
def test_rows_are_flat_on_all_workers_or_on_none(tmp_path: Path) -> None:
    mp.spawn(_asks, (tmp_path,), nprocs=2)


def test_heads_are_those_of_the_config() -> None:
    assert heads_of(classifier("qwen3").config) == Shape(4, 2, 8, 8)
    assert heads_of(classifier("gpt2").config) == Shape(4, 4, 8, 8)
