"""No shipped configuration costs a GPU more than it did when its budget was set."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from moa_dist.config import load_config
from moa_dist.kernels import triton_gradients
from moa_dist.kernels.hardware import Hardware
from moa_dist.models import padding, rope_kernel, softmax
from moa_dist.models.mask import AttentionMask
from tests.fake_cuda.budgets import BUDGETS
from tests.fake_cuda.estimates import floor_of, of_experts, part_bytes
from tests.fake_cuda.launches import fake_cuda
from tests.fake_cuda.training_step import bf16_model, measure


@pytest.mark.parametrize("path", BUDGETS)
def test_a_micro_batch_stays_within_its_budget(path):
    """If it needs less by now, lower the budget: `python -m tests.fake_cuda` prints the numbers.

    Neither may it need much more than its parts must move, nor less: then an estimate is wrong.
    """
    launches, saved = measure(path)
    budget = BUDGETS[path]
    measured = {
        "kernels": launches.num_kernels,
        "gb_full": launches.bytes_full / 1e9,
        "gb_distinct": launches.bytes_distinct / 1e9,
        "gib_saved": saved / 2**30,
    }
    above = {name: value for name, value in measured.items() if value > getattr(budget, name)}
    assert not above, budget
    assert not launches.waits
    assert not launches.fp64
    assert not launches.narrow_sums
    model = bf16_model(path)
    parts = part_bytes(model, 8 * 1024)
    assert 1 <= launches.bytes_full / sum(parts.values()) <= 1.3
    if of_experts(parts):
        assert 1 <= of_experts(launches.bytes_by_place) / of_experts(parts) <= 1.3
        assert min(floor_of(model, 8 * 1024)) > 0
    # A budget that much is left of would not notice a regression.
    loose = {name: value for name, value in measured.items() if value < 0.9 * getattr(budget, name)}
    assert not loose, budget


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("path", ["configs/small/moeut.yaml", "configs/translation/small_moa.yaml"])
def test_padding_and_recomputation_do_not_wait(path, recompute):
    launches, _ = measure(path, 2, 64, padded=True, recompute=recompute)
    assert launches.num_kernels
    assert not launches.waits
    assert not launches.fp64


def test_recomputation_saves_memory_and_chooses_once():
    kept, again = (measure("configs/small/moeut.yaml", 2, 64, recompute=r) for r in (False, True))
    assert again.saved < 0.5 * kept.saved
    assert again.launches.num_kernels > kept.launches.num_kernels


def test_the_record_itself():
    x = torch.empty(64, 32, device="meta", requires_grad=True)
    with fake_cuda() as record:
        assert Hardware.of(x.device).runs_triton
        with record() as launches:
            y = (x.relu() * 2).view(-1)
        assert launches.kernels == {"relu": 1, "mul": 1}
        assert launches.bytes_full == launches.bytes_distinct == 4 * x.nbytes
        with record() as launches:
            x.detach().index_select(0, torch.empty(256, dtype=torch.int64, device="meta"))
        assert launches.bytes_full == 2 * 256 * 32 * 4 + 256 * 8
        with record() as launches:
            y.sum().backward()
        assert launches.num_kernels > 2


def test_waits_narrow_sums_and_empty_launches_are_noticed():
    with fake_cuda() as record:
        with record() as launches:
            x = torch.empty(8, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
            x.index_select(0, torch.empty(16, dtype=torch.int64, device="meta")).sum().backward()
        assert launches.narrow_sums.total() == 1
        with record() as launches:
            torch.ones(3).to("meta") + torch.empty(3, device="meta")
        assert launches.waits.total() == 1
        unused = dict.fromkeys(inspect.signature(rope_kernel._rotate.fn).parameters)
        with pytest.raises(AssertionError, match="without a tensor"):
            record().triton(rope_kernel._rotate, (), unused)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "path", ["configs/moeut/44m.yaml", "configs/moa/8k16e256d.yaml", "configs/dense/244m.yaml"]
)
def test_documents_need_neither_masks_nor_waits(path, recompute):
    sequences, length = 2, 1024
    plain, apart = (
        measure(path, sequences, length, recompute=recompute, num_documents=n) for n in (0, 8)
    )
    kernels = apart.launches.kernels
    assert kernels["_varlen_attn"] == kernels["_varlen_attn_backward"] * (1 + recompute) > 0
    assert not apart.launches.waits
    assert not apart.launches.fp64
    assert apart.launches.largest_mask < length * length
    assert apart.saved < 1.01 * plain.saved  # the prediction of memory holds for both
    assert apart.launches.bytes_full < 1.15 * plain.launches.bytes_full


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("path", "per_layer"),
    [("configs/masked_lm/8k16e256d.yaml", 1), ("configs/translation/moa.yaml", 3)],
)
def test_padding_needs_neither_masks_nor_waits(path, per_layer, recompute):
    """Not for attention to a source either, which a layer of encoder and decoder has as well."""
    sequences, length = 2, 1024
    plain, padded = (
        measure(path, sequences, length, recompute=recompute, padded=p) for p in (False, True)
    )
    attentions = load_config(path).model.num_layers * per_layer
    kernels = padded.launches.kernels
    assert kernels["_varlen_attn_backward"] == attentions
    assert kernels["_varlen_attn"] == attentions * (1 + recompute)
    assert not [name for name in kernels if name.startswith("_scaled_dot_product")]
    assert not padded.launches.waits
    assert padded.launches.largest_mask < length * length
    assert padded.saved < 1.02 * plain.saved
    assert padded.launches.bytes_full < 1.15 * plain.launches.bytes_full


@pytest.mark.parametrize("path", ["configs/masked_lm/8k16e256d.yaml"])
def test_padding_needs_a_mask_where_flash_attention_does_not_run(path, monkeypatch):
    monkeypatch.setattr(padding, "flash_fits", lambda *_: False)
    kernels = measure(path, 2, 64, padded=True).launches.kernels
    assert kernels["_scaled_dot_product_efficient_attention"]
    assert not kernels["_varlen_attn"]


@pytest.mark.parametrize("num_documents", [0, 8])
@pytest.mark.parametrize(
    "path", ["configs/moeut/44m.yaml", "configs/moa/8k16e256d.yaml", "configs/dense/244m.yaml"]
)
def test_windows_are_those_of_flash_attention(path, num_documents):
    """No masks, no waits, nothing else to keep; with documents, full layers go there too."""
    sequences, length = 2, 1024
    plain = measure(path, sequences, length)
    local = measure(
        path,
        sequences,
        length,
        num_documents=num_documents,
        overrides=["model.attention.window={size: 128, full_every: 2}"],
    )
    kernels = local.launches.kernels
    num_layers = load_config(path).model.num_layers
    expected = num_layers if num_documents else num_layers // 2
    assert kernels["_varlen_attn"] == kernels["_varlen_attn_backward"] == expected
    assert not local.launches.waits
    assert local.launches.largest_mask < length * length
    assert local.saved < 1.01 * plain.saved


@pytest.mark.parametrize("padded", [False, True])
def test_soft_caps_need_neither_masks_nor_logits_of_whole_sequences(padded):
    sequences, length, path = 1, 1024, "configs/small/moeut.yaml"
    overrides = ["model.attention.soft_cap=50", "model.attention.window={size: 256, full_every: 2}"]
    plain = measure(path, sequences, length)
    capped = measure(path, sequences, length, padded=padded, overrides=overrides)
    assert not capped.launches.waits
    assert capped.launches.largest_mask <= 128 * length < length * length
    assert capped.saved < 1.01 * plain.saved


def test_a_mask_of_documents_would_be_noticed(monkeypatch):
    def masked(q, k, v, documents, *, causal):
        visible = softmax.visible_keys(q, k, AttentionMask(causal, documents=documents))
        return F.scaled_dot_product_attention(q, k, v, visible)

    monkeypatch.setattr(softmax, "document_attention", masked)
    launches, _ = measure("configs/small/moeut.yaml", 2, 64, num_documents=8)
    assert launches.largest_mask >= 64 * 64


def test_a_sum_in_place_is_read_and_written():
    with fake_cuda() as record:
        total, other = (torch.empty(4, 8, 8, device="meta") for _ in range(2))
        operands = dict.fromkeys(inspect.signature(triton_gradients._outer_products.fn).parameters)
        moved = []
        for before in (None, other, total):
            launches = record()
            named = operands | {"before": before, "out": total}
            launches.triton(triton_gradients._outer_products, (), named)
            moved.append(launches.bytes_full)
        assert moved == [total.nbytes, 2 * total.nbytes, 2 * total.nbytes]
