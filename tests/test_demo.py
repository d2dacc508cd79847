"""The demo: its short form end to end, and the claims it rests on."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
from pydeform import demo
from pydeform.demo import data, networks, parts, training

PICTURES = {"digits", "sampling_points", "offset_field", "effective_dilation", "learning_curves"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert demo.main(["--quick", "--seed", "3", "--output", str(folder)]) == 0
    return folder


def without_seconds(folder):
    result = json.loads((folder / "result.json").read_text())
    for found in result["networks"].values():
        del found["seconds"]
    return result


def test_quick_writes_pictures_networks_and_numbers(quick):
    assert {path.stem for path in quick.glob("*.png")} == PICTURES
    assert all(path.stat().st_size > 5000 for path in quick.glob("*.png"))
    assert {path.stem for path in quick.glob("*.npz")} == {"plain", "deformable_v1", "modulated_v2"}
    result = without_seconds(quick)
    assert list(result["networks"]) == list(networks.WIDTHS) and result["seeds"] == [3]
    assert np.shape(result["networks"]["deformable v1"]["effective_dilation_by_layer_and_scale"]) == (1, 2, 5)


def test_quick_does_not_touch_what_a_real_run_left(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("pydeform.demo.run.digits", lambda options: asked.append(options.output) or 0)
    assert demo.main(["--quick"]) == demo.main([]) == demo.main(["--quick", "--output", "here"]) == 0
    assert [str(folder) for folder in asked] == ["demo_output/quick", "demo_output", "here"]


def test_the_same_result_twice(quick, tmp_path, capsys):
    assert demo.main(["--quick", "--seed", "3", "--output", str(tmp_path)]) == 0
    assert without_seconds(tmp_path) == without_seconds(quick)
    captured = capsys.readouterr()
    assert "effective dilation by object scale" in captured.out and "modulated v2" in captured.out
    assert "10 % is guessing" in captured.out
    # Progress goes to stderr, which is no terminal here: a line for each network, no bar.
    assert [line.split(":")[0] for line in captured.err.splitlines()] == [f"{kind}, seed 3" for kind in networks.WIDTHS]


def test_image_with_a_trained_and_with_a_seeded_network(quick, tmp_path, capsys):
    assert demo.main(["--image", "--output", str(quick)]) == 0
    assert "trained on digits" in capsys.readouterr().out
    assert (quick / "points_on_flower.png").stat().st_size > 5000
    (quick / "points_on_flower.png").rename(tmp_path / "photo.png")
    assert demo.main(["--image", str(tmp_path / "photo.png"), "--output", str(tmp_path)]) == 0
    assert "seeded with 0" in capsys.readouterr().out
    assert (tmp_path / "points_on_photo.png").exists()


def test_parts_climb_their_maps_class_by_class(tmp_path, capsys):
    assert demo.main(["--parts", "--output", str(tmp_path)]) == 0
    assert 5000 < (tmp_path / "roi_parts.png").stat().st_size < 400_000  # small enough for a README
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("mean score in the bins" in line for line in lines[1:])
    maps = np.zeros((1, 2, 40, 40))
    maps[0, 0] = np.arange(40)  # class 0 grows to the right, class 1 is flat
    found = parts.climb(maps / 40, (40, 40, 99, 99), steps=5)
    assert (found.trans[0, 0] > 0).all() and not found.trans[0, 1:].any()
    assert found.after[0] > found.before[0]
    again = parts.climb(maps / 40, (40, 40, 99, 99), steps=5)
    np.testing.assert_array_equal(again.trans, found.trans)


def test_score_maps_are_blurred_nearness_of_colour():
    photo = np.zeros((80, 120, 3), np.uint8)
    photo[:, :60] = (200, 100, 50)
    maps = parts.score_maps(photo, [(200, 100, 50), (0, 0, 0)])
    assert maps.shape == (1, 2, 20, 30)
    np.testing.assert_allclose(maps[0, :, 10, [5, 24]], [[1, 0], [0, 1]], atol=0.1)
    assert (np.diff(maps[0, 0, 10, 8:22]) < 0).all()


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    assert demo.main(["--image", "nowhere.jpg", "--output", str(tmp_path)]) == 1
    assert "nowhere.jpg" in capsys.readouterr().err
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "scikit-learn" in message and "demo" in message


def test_networks_have_equal_size_and_start_alike():
    sizes = [networks.parameters(networks.build(kind, np.random.default_rng(0))) for kind in networks.WIDTHS]
    assert max(sizes) <= 1.01 * min(sizes)
    image = np.random.default_rng(0).random((2, 1, data.SIZE, data.SIZE), np.float32)
    for kind in ("deformable v1", "modulated v2"):
        network = networks.build(kind, np.random.default_rng(0))
        found = networks.offsets(network, image)
        assert [offset.shape for offset in found] == [(2, 18, 14, 14), (2, 18, 7, 7)]
        assert not any(offset.any() for offset in found)


def test_placed_digits(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 0)
    digits = np.ones((200, 8, 8), np.float32)
    placed = data.place(digits, np.random.default_rng(0), scales=(2, 2), rotation=0, shear=0, shift=0)
    assert placed.image.shape == (200, 1, data.SIZE, data.SIZE) and placed.image.dtype == np.float32
    # 8 digit pixels at scale 2 cover 16 image pixels, with soft edges
    np.testing.assert_allclose(placed.image.sum(axis=(1, 2, 3)), 16 * 16, rtol=0.02)
    assert ((placed.depth > 0).sum(axis=(1, 2)) == 16 * 16).all()
    many = data.place(digits, np.random.default_rng(0))
    assert many.scale.min() >= 1 and many.scale.max() <= 3 and many.scale.std() > 0.3
    again = data.place(digits, np.random.default_rng(0))
    np.testing.assert_array_equal(many.image, again.image)
    assert (many.depth.max(axis=(1, 2)) > 0.7).all()  # the digit's centre lies in the image


def test_split_is_fixed_and_disjoint():
    digits = data.load_digits()
    assert len(digits.train_x) == data.TRAIN and len(digits.test_x) == 1797 - data.TRAIN
    train = {x.tobytes() for x in digits.train_x}
    assert not any(x.tobytes() in train for x in digits.test_x)
    assert len(training.test_set(digits).label) == 2 * len(digits.test_y)
