"""Storage behind a path, from made-up /sys and /proc trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.flash_behind import storage_behind, storage_of


def disk(root: Path, name: str, number: str, place: str = "devices/pci0/block") -> Path:
    folder = root / "sys" / place / name
    folder.mkdir(parents=True)
    for links in ("sys/dev/block", "sys/class/block"):
        (root / links).mkdir(parents=True, exist_ok=True)
    (root / "sys/dev/block" / number).symlink_to(folder)
    (root / "sys/class/block" / name).symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("nvme0n1", "devices/pci0/nvme", "nvme"),
        ("sda", "devices/pci0/ata1/block", "sata"),
        ("sda", "devices/platform/soc/1d84000.ufshc/host0/block", "ufs"),
        ("vda", "devices/virtio0/block", "virtual"),
        ("zram0", "devices/virtual/block", "virtual"),
    ],
)
def test_kind_follows_the_driver(tmp_path: Path, name: str, place: str, kind: str) -> None:
    disk(tmp_path, name, "8:0", place)
    found = storage_of("8:0", tmp_path)
    assert (found.name, found.kind) == (name, kind)


@pytest.mark.parametrize(("kind", "card"), [("sd", "SD"), ("emmc", "MMC")])
def test_cards_and_soldered_chips_are_told_apart(tmp_path: Path, kind: str, card: str) -> None:
    folder = disk(tmp_path, "mmcblk0", "179:0")
    (folder / "device").mkdir()
    (folder / "device/type").write_text(f"{card}\n")
    assert storage_of("179:0", tmp_path).kind == kind


def test_partition_stands_for_its_disk(tmp_path: Path) -> None:
    whole = disk(tmp_path, "nvme0n1", "259:0")
    part = whole / "nvme0n1p2"
    part.mkdir()
    (part / "partition").write_text("2")
    (tmp_path / "sys/dev/block/259:2").symlink_to(part)
    assert storage_of("259:2", tmp_path).name == "nvme0n1"


def test_mapped_device_stands_for_what_it_lies_on(tmp_path: Path) -> None:
    below = disk(tmp_path, "nvme1n1", "259:1")
    mapped = disk(tmp_path, "dm-0", "253:0", "devices/virtual/block")
    (mapped / "slaves").mkdir()
    (mapped / "slaves/nvme1n1").symlink_to(below)
    assert storage_of("253:0", tmp_path).kind == "nvme"


def test_loop_of_mapped_devices_ends(tmp_path: Path) -> None:
    mapped = disk(tmp_path, "dm-0", "253:0")
    (mapped / "slaves").mkdir()
    (mapped / "slaves/dm-0").symlink_to(mapped)
    assert storage_of("253:0", tmp_path).name == "dm-0"


def test_file_system_without_a_number_is_found_by_its_mount(tmp_path: Path) -> None:
    disk(tmp_path, "sda1", "8:1", "devices/pci0/ata1/block")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "22 1 0:33 / / rw,relatime shared:1 - btrfs /dev/sda1 rw\n"
        "23 1 0:40 / /tmp rw - tmpfs tmpfs rw\n"
    )
    assert storage_of("0:33", tmp_path).kind == "sata"
    assert storage_of("0:40", tmp_path).name == "tmpfs"
    assert storage_of("0:41", tmp_path).kind == "virtual"


def mounts(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")


def test_number_that_no_mount_has_is_found_by_the_nearest_mount_point(tmp_path: Path) -> None:
    disk(tmp_path, "sda1", "8:1", "devices/pci0/ata1/block")
    disk(tmp_path, "nvme0n1", "259:0", "devices/pci0/nvme")
    mounts(
        tmp_path,
        "22 1 0:33 / / rw,relatime shared:1 - btrfs /dev/sda1 rw",
        "23 22 0:34 / /home rw - btrfs /dev/nvme0n1 rw",
        "24 22 0:35 / /homes\\040and rw - nfs4 server:/export rw",
    )
    for place, name in (
        ("/home/me/model.gguf", "nvme0n1"),
        ("/homes/me", "sda1"),
        ("/homes and/me", "nfs4 server:/export"),
    ):
        assert storage_of("0:99", tmp_path, Path(place)).name == name
    assert storage_of("0:99", tmp_path).name == "device 0:99"


def test_mounts_of_one_system_have_names_of_their_own_that_last(tmp_path: Path) -> None:
    mounts(
        tmp_path,
        "23 22 0:40 / /a rw - nfs4 one:/models rw",
        "24 22 0:41 / /b rw - nfs4 two:/models rw",
        "25 22 0:42 / /c rw - overlay overlay rw",
    )
    names = [storage_of(number, tmp_path).name for number in ("0:40", "0:41", "0:42")]
    assert names == ["nfs4 one:/models", "nfs4 two:/models", "overlay"]


def test_later_mount_at_the_same_point_covers_the_earlier(tmp_path: Path) -> None:
    mounts(
        tmp_path,
        "23 22 0:40 / /a rw - nfs4 one:/models rw",
        "24 23 0:41 / /a rw - nfs4 two:/models rw",
    )
    assert storage_of("0:99", tmp_path, Path("/a/model")).name == "nfs4 two:/models"


def test_mapped_device_is_mounted_by_a_link_to_it(tmp_path: Path) -> None:
    below = disk(tmp_path, "nvme1n1", "259:1")
    mapped = disk(tmp_path, "dm-0", "253:0", "devices/virtual/block")
    (mapped / "slaves").mkdir()
    (mapped / "slaves/nvme1n1").symlink_to(below)
    (tmp_path / "dev/mapper").mkdir(parents=True)
    (tmp_path / "dev/dm-0").touch()
    (tmp_path / "dev/mapper/luks").symlink_to("../dm-0")
    mounts(tmp_path, "22 1 0:33 / / rw - btrfs /dev/mapper/luks rw")
    assert storage_of("0:33", tmp_path).name == "nvme1n1"


def test_path_that_is_not_there_yet_counts_as_its_folder(tmp_path: Path) -> None:
    assert storage_behind(tmp_path / "not" / "yet") == storage_behind(tmp_path)
