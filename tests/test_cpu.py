"""infra/cpu.py: matmuls on a CPU stay exact to fp32, and settings that a machine does not have change nothing."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from infra import cpu, model
from infra.run import describe
from settings import Settings

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
    monkeypatch.setattr(cpu.sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("Windows has no library without a name"))
    cpu.tune(1)


def test_a_model_that_computes_on_a_cpu_is_tuned_for_its_width(monkeypatch):
    tuned = []
    monkeypatch.setattr(cpu, "tune", tuned.append)
    model.load("arithmetic-smoke")
    assert tuned == [model.read_config("arithmetic-smoke").hidden_size]
    model.load("arithmetic-smoke", torch.device("meta"))
    assert len(tuned) == 1, "nothing is computed on a CPU"


CASES = [("cpu", "bfloat16", 8, 1), ("cpu", "bfloat16", 0.5, 0), ("cpu", "float32", 8, 0), ("cuda", "bfloat16", 8, 0)]


@pytest.mark.parametrize(("device", "dtype", "slowdown", "warns"), CASES)
def test_a_run_says_where_bfloat16_is_slower_than_float32(device, dtype, slowdown, warns, monkeypatch):
    monkeypatch.setattr("infra.run.pick_device", lambda: torch.device(device))
    monkeypatch.setattr(cpu, "slowdown_of_bf16", lambda: slowdown)
    text = describe(Settings(dtype=dtype), {}, {})
    assert text.count("this CPU takes 8 times as long in bfloat16 as in float32: --dtype float32 saves time") == warns


def test_the_slowdown_of_bfloat16_is_its_time_divided_by_that_of_float32(monkeypatch):
    monkeypatch.setattr(cpu, "perf_counter", iter([0, 1, 0, 8]).__next__)
    assert cpu.slowdown_of_bf16() == 8
