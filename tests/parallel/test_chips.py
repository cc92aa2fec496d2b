"""Data sheets by the name of a device."""

from mobilellm_jax.parallel.chips import CHIPS, find_chip, peak_flops


def test_the_peak_of_a_device_is_known_by_its_kind():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def test_a_tpu7x_chip_is_two_devices():
    half = find_chip("TPU7x")
    assert half and half.devices_per_chip == 2
    assert half.flops == 2307e12 / 2
    assert {chip.devices_per_chip for chip in CHIPS if chip is not half} == {1}
