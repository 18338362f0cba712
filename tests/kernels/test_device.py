"""kernels/device.py: what is known of the chip that a tensor lies on."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from clsa_compile.errors import OptionError
from clsa_compile.kernels import device as device_module
from clsa_compile.kernels.device import H100, Device, bandwidth


@pytest.fixture
def other_chip(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two chips: 0 is an A100, 1 one that nobody has heard of."""
    chips = (
        SimpleNamespace(
            name="NVIDIA A100-SXM4-80GB",
            multi_processor_count=108,
            shared_memory_per_multiprocessor=167936,
            shared_memory_per_block_optin=166912,
            regs_per_multiprocessor=65536,
        ),
        SimpleNamespace(
            name="Chip", multi_processor_count=20, memory_clock_rate=1_000_000, memory_bus_width=512
        ),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chips[index])
    device_module._present.cache_clear()
    yield
    device_module._present.cache_clear()


def test_without_a_gpu_it_is_the_chip_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (None, torch.device("meta"), torch.device("cpu"), torch.device("cuda", 3)):
        assert Device.of(device) is H100


@pytest.mark.usefixtures("other_chip")
def test_it_is_the_chip_of_the_tensor_and_not_the_current_one() -> None:
    first = Device.of(torch.device("cuda", 0))
    assert (first.name, first.sms, first.bandwidth) == ("NVIDIA A100-SXM4-80GB", 108, 2.04e12)
    assert (first.shared, first.program_shared) == (167936, 166912)
    assert Device.of(torch.device("cuda")).sms == 20
    assert Device.of(torch.device("meta")) is H100, "a trace without a device is for the measured one"


@pytest.mark.usefixtures("other_chip")
def test_what_a_driver_does_not_say_is_taken_from_the_measured_chip() -> None:
    unknown = Device.of(torch.device("cuda", 1))
    assert unknown.bandwidth == 2 * 1e9 * 512 / 8
    assert (unknown.shared, unknown.registers) == (H100.shared, H100.registers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.04e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA GH200 480GB", 4.0e12),
        ("something", H100.bandwidth),
    ],
)
def test_bandwidths(name: str, expected: float) -> None:
    assert bandwidth(SimpleNamespace(name=name)) == expected


@pytest.mark.gpu
def test_a_real_chip() -> None:
    found = Device.of(torch.device("cuda"))
    assert found.name == torch.cuda.get_device_name()
    assert found.sms > 0
    assert 1e11 < found.bandwidth < 2e13
    assert 0 < found.program_shared <= found.shared


def test_chips_by_name() -> None:
    assert Device.named("H100") is H100
    a100 = Device.named("a100")
    assert (a100.sms, a100.bandwidth, a100.rate) == (108, 2.04e12, 3.12e14)
    assert H100.rate == 9.89e14
    with pytest.raises(OptionError, match="no device is called 'z80'; known are h100, h200, b200, a100"):
        Device.named("z80")
