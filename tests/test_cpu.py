"""infra/cpu.py: matmuls on a CPU stay exact to fp32, and settings that a machine does not have change nothing."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from infra import cpu, model

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _default_precision():
    """Each test begins and ends with torch's default."""
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


def test_after_tune_wide_models_multiply_by_onednn_or_not_but_exactly():
    before = MATMUL.fp32_precision
    cpu.tune(cpu.WIDE)
    assert MATMUL.fp32_precision in ("bf16", before)
    x = torch.full((64, 512), 1 + 2**-20)
    assert torch.equal(x @ torch.eye(512), x)


def test_the_setting_goes_back_where_onednn_rounds_to_bf16(monkeypatch):
    rounding = torch.eye(64) * (1 - 2**-10)  # the products are no longer x, as with bf16's matrix units
    monkeypatch.setattr(torch, "eye", lambda n: rounding)
    before = MATMUL.fp32_precision
    cpu.multiply_by_onednn()
    assert MATMUL.fp32_precision == before


def test_the_setting_stays_where_onednn_is_exact(monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda a, b: True)
    cpu.multiply_by_onednn()
    assert MATMUL.fp32_precision == "bf16"


def test_narrow_models_keep_torchs_default(monkeypatch):
    monkeypatch.setattr(cpu, "multiply_by_onednn", lambda: pytest.fail("the model is narrow"))
    cpu.tune(cpu.WIDE - 1)


def test_tune_keeps_freed_memory_only_with_a_c_library_that_has_mallopt(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *pair: calls.append(pair)))
    cpu.tune(1)
    assert calls == [(cpu.M_MMAP_MAX, 0), (cpu.M_TRIM_THRESHOLD, 2**31 - 1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    cpu.tune(1)
    assert len(calls) == 2


def test_a_model_is_loaded_after_tuning_for_its_width(tmp_path, monkeypatch):
    tuned = []
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(cpu, "tune", tuned.append)
    with pytest.raises(model.ModelError, match="tokenizer"):  # the folder has none
        model.load(str(tmp_path))
    assert tuned == [32]
