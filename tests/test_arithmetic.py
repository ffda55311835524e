"""The settings of the process that decide how fast a CPU computes."""

import platform

import pytest
import torch

from llmforge.models import arithmetic
from llmforge.models.arithmetic import AS_EXACT, WORTH, choose_matmul, keep_freed_memory, settle_matmul

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def pretend(monkeypatch, *, speedup: float, error: float) -> None:
    """Replace the measurements by those of another machine, whose plain products take a second and err by 1e-7."""

    def measured(plain: float, other: float):
        return lambda left, right: other if torch.get_float32_matmul_precision() == "medium" else plain

    monkeypatch.setattr(arithmetic, "_seconds", measured(1.0, 1.0 / speedup))
    monkeypatch.setattr(arithmetic, "_error", measured(1e-7, error))


def test_what_is_chosen_here_is_exact():
    path = choose_matmul(CPU)
    assert path is not None
    assert torch.get_float32_matmul_precision() == path.precision
    left, right = torch.randn(300, 200), torch.randn(200, 100)
    exact = left.double() @ right.double()
    assert (left @ right - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize(
    ("speedup", "error", "precision"),
    [
        (2.1, 4e-7, "medium"),
        (2.1, 1e-3, "highest"),  # AMX: computed in bf16
        (WORTH - 0.1, 1e-7, "highest"),  # not worth it
        (2.1, (AS_EXACT + 1) * 1e-7, "highest"),
    ],
)
def test_both_speed_and_error_decide(monkeypatch, speedup, error, precision):
    pretend(monkeypatch, speedup=speedup, error=error)
    torch.set_float32_matmul_precision("highest")
    path = choose_matmul(CPU)
    assert path is not None
    assert path.precision == torch.get_float32_matmul_precision() == precision


def test_a_choice_holds_for_every_run_that_shares_the_cache(monkeypatch, tmp_path):
    """A run that is killed before its first checkpoint must not compute another way when it starts again."""
    pretend(monkeypatch, speedup=2.1, error=4e-7)
    assert settle_matmul(CPU, tmp_path / "cache") == "medium"
    pretend(monkeypatch, speedup=0.5, error=4e-7)  # as it may look under load
    torch.set_float32_matmul_precision("highest")
    assert settle_matmul(CPU, tmp_path / "cache") == torch.get_float32_matmul_precision() == "medium"
    assert settle_matmul(CPU, tmp_path / "another") == torch.get_float32_matmul_precision() == "highest"

    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"\xff")
    assert settle_matmul(CPU, tmp_path / "cache") == "highest"
    file.unlink()
    (tmp_path / "file").touch()
    assert settle_matmul(CPU, tmp_path / "file") == "highest"  # nowhere to keep it


def test_no_choice_on_other_devices():
    before = torch.get_float32_matmul_precision()
    assert choose_matmul(torch.device("meta")) is None
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again():
    import resource

    assert keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16_000_000)  # 64 MB, 15,625 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(3)) < 8_000
