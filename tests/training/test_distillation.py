"""Distillation: the paper's loss, a teacher that stays as it was, and runs that stop and go on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.commands import RECIPE
from tests.training.tiny import ALONE, DROPOUT, data_set, run_config
from training import checkpoint
from training.__main__ import main
from training.checkpoint import CheckpointError, RunConfig
from training.distillation import Teacher, check_teachers, distillation_loss, mean_answer
from training.train import Trainer
from training.transfer import read_origin

pytestmark = pytest.mark.usefixtures("without_figures")

# With all that changes the pixels, and all that a teacher must not do though its run did: drop out.
MIXED = {"zoom": 0.2, "crop_padding": 1, "mixup": 0.4, "cutmix": 1.0, "trivial_augment": 1.0, "label_smoothing": 0.1}


def taught(folder: Path, **train: object) -> tuple[RunConfig, Path]:
    """A run that begins with one that has trained for an epoch and learns from it, and the latter's checkpoint."""
    first = Trainer(run_config(DROPOUT, epochs=1), data_set(), folder, ALONE)
    first.fit()
    path = folder / "best.safetensors"
    run = run_config(DROPOUT, **({"distillation": 0.5} | MIXED | train))
    return run.model_copy(update={"init": read_origin(path)}), path


def trainer_of(run: RunConfig, folder: Path, path: Path) -> Trainer:
    folder.mkdir()
    trainer = Trainer(run, data_set(), folder, ALONE)
    trainer.load_origins([path], [path] * len(run.teachers))
    return trainer


def divergence(theirs: Tensor, mine: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats, by its definition."""
    return (theirs * (theirs.log() - mine.log())).sum(dim=1).mean()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_the_paper(share: float, temperature: float) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    theirs, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    found = distillation_loss(loss, logits, theirs, share, temperature)
    softened = ((values / temperature).softmax(dim=1) for values in (theirs, logits))
    expected = (1 - share) * loss + share * temperature**2 * divergence(*softened)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_who_answers_as_the_teacher_does_has_nothing_to_learn_from_it() -> None:
    theirs = torch.randn(5, 4, dtype=torch.float64)
    logits = theirs.clone().requires_grad_()
    loss = distillation_loss(logits.sum() * 0, logits, theirs, 1.0, 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros_like(theirs), rtol=0, atol=1e-12)


def test_the_teacher_is_the_model_that_the_run_began_with_and_stays_it(tmp_path: Path) -> None:
    run, path = taught(tmp_path)
    trainer = trainer_of(run, tmp_path / "run", path)
    (teacher,) = trainer.state.teachers
    began, preprocess, _ = checkpoint.load_model(path)
    trainer.fit()
    for mine, theirs in ((teacher.model, began), (teacher.preprocess, preprocess)):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name
    assert any(not torch.equal(a, b) for a, b in zip(trainer.state.model.parameters(), began.parameters(), strict=True))
    # It answers as it would when it is served: no dropout.
    images = data_set().val.images
    with torch.no_grad():
        torch.testing.assert_close(teacher(teacher.preprocess(images)), began(preprocess(images)), rtol=0, atol=0)


def test_the_teacher_sees_the_pixels_that_the_model_sees(tmp_path: Path) -> None:
    run, path = taught(tmp_path, mix_probability=1.0)
    trainer = trainer_of(run, tmp_path / "run", path)
    seen: dict[str, list[Tensor]] = {"model": [], "teacher": []}
    for name, model in (("model", trainer.state.model), ("teacher", trainer.state.teachers[0].model)):
        model.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    for indices in torch.arange(16).view(2, 8):
        trainer.one_step(indices)
    assert len(seen["model"]) == 2
    for mine, theirs in zip(seen["model"], seen["teacher"], strict=True):
        # Both took mean and variance from the same images.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        plain = trainer.state.preprocess(trainer.train_split.images[:8])
        assert not torch.allclose(mine, plain)


def test_a_teacher_that_is_served_with_two_views_is_asked_once(tmp_path: Path) -> None:
    first = Trainer(run_config({"test_time_flip": True}, epochs=1), data_set(), tmp_path, ALONE)
    first.fit()
    path = tmp_path / "best.safetensors"
    teacher = Teacher(read_origin(path))
    teacher.load_weights(path)
    served, preprocess, _ = checkpoint.load_model(path)
    pixels = preprocess(data_set().val.images)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels), served.forward_view(pixels), rtol=0, atol=0)
        assert not torch.allclose(teacher(pixels), served(pixels))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_one_teacher_an_image_is_asked_about_its_part_of_the_batch(batch: int, tmp_path: Path) -> None:
    run, path = taught(tmp_path, teachers_per_image="one", mix_probability=1.0)
    trainer = trainer_of(run.model_copy(update={"teachers": (read_origin(path),) * 3}), tmp_path / "run", path)
    seen: list[Tensor] = []
    for teacher in trainer.state.teachers:
        teacher.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student: list[Tensor] = []
    trainer.state.model.register_forward_pre_hook(lambda _, inputs: student.append(inputs[0]))
    trainer.one_step(torch.arange(batch))
    sizes = {1: [1], 2: [1, 1], 7: [3, 2, 2]}[batch]
    assert [len(pixels) for pixels in seen] == sizes
    torch.testing.assert_close(torch.cat(seen), student[0], rtol=0, atol=0)


def test_one_teacher_an_image_gives_what_all_give_where_they_agree(tmp_path: Path) -> None:
    run, path = taught(tmp_path, epochs=1)
    run = run.model_copy(update={"teachers": (read_origin(path),) * 2})
    weights = []
    for asked in ("all", "one"):
        config = run.train.model_copy(update={"teachers_per_image": asked})
        trainer = trainer_of(run.model_copy(update={"train": config}), tmp_path / asked, path)
        trainer.fit()
        weights.append(list(trainer.state.model.parameters()))
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_share_of_nothing_is_the_run_without_a_teacher(tmp_path: Path) -> None:
    run, path = taught(tmp_path, distillation=1e-30, epochs=1)
    without = run.model_copy(update={"train": run.train.model_copy(update={"distillation": 0.0})})
    trainers = [trainer_of(each, tmp_path / name, path) for each, name in ((run, "with"), (without, "without"))]
    assert trainers[1].state.teachers == []
    for trainer in trainers:
        trainer.fit()
    for mine, theirs in zip(*(trainer.state.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_goes_on_bit_for_bit_without_the_one_it_began_with(tmp_path: Path) -> None:
    run, path = taught(tmp_path, precision="bfloat16", ema_decay=0.8)
    whole = trainer_of(run, tmp_path / "whole", path)
    whole.fit()
    trainer_of(run, tmp_path / "stopped", path).fit(max_steps=7)
    path.unlink()
    resumed = Trainer(run, data_set(), tmp_path / "stopped", ALONE)
    resumed.resume()
    resumed.fit()
    one, other = (checkpoint.load(trainer.folder / "last.safetensors")[0] for trainer in (whole, resumed))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_what_is_exported_holds_no_teacher(tmp_path: Path) -> None:
    run, path = taught(tmp_path, epochs=1)
    trainer = trainer_of(run, tmp_path / "run", path)
    trainer.fit()
    tensors, _ = checkpoint.load(trainer.folder / "best.safetensors")
    assert not checkpoint.strip_prefix("teacher", tensors)


def test_a_teacher_of_other_classes_or_other_pixels_is_refused(tmp_path: Path) -> None:
    run, _ = taught(tmp_path)
    check_teachers(run)
    wants = r"--distillation 0\.5 needs answers in the classes of these images, and the model of "
    others = {"labels": ("ant", "bee", "dog")}
    with pytest.raises(CheckpointError, match=wants + "--init tells"):
        check_teachers(run.model_copy(update=others))
    with pytest.raises(CheckpointError, match=wants + "--teacher tells"):
        check_teachers(run.model_copy(update=others | {"init": None, "teachers": (run.init,)}))
    larger = run.model.model_copy(update={"image_size": 16})
    with pytest.raises(CheckpointError, match=r"it could with --image-size 8\.$"):
        check_teachers(run.model_copy(update={"model": larger}))
    check_teachers(
        run.model_copy(update={"train": run.train.model_copy(update={"distillation": 0.0}), "model": larger})
    )


def test_a_teacher_of_any_architecture_teaches_a_model_that_begins_at_random(tmp_path: Path) -> None:
    _, path = taught(tmp_path)
    run = run_config({"dim": 12, "num_blocks": 0, "patch_size": 4}, epochs=1, distillation=0.5, **MIXED)
    run = run.model_copy(update={"teachers": (read_origin(path),)})
    assert run.taught_by == run.teachers
    trainer = Trainer(run, data_set(), tmp_path, ALONE)
    fresh = [weights.clone() for weights in trainer.state.model.parameters()]
    trainer.load_origins([], [path])
    assert all(torch.equal(*pair) for pair in zip(fresh, trainer.state.model.parameters(), strict=True))
    began, _, _ = checkpoint.load_model(path)
    for name, tensor in began.state_dict().items():
        assert torch.equal(trainer.state.teachers[0].model.state_dict()[name], tensor), name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="has changed since this run was prepared"):
        trainer.load_origins([], [path])


def test_of_a_beginning_and_a_teacher_each_has_its_part(tmp_path: Path) -> None:
    run, init = taught(tmp_path)
    teacher = shutil.copytree(tmp_path, tmp_path / "other") / "best.safetensors"
    tensors, header = checkpoint.load(teacher)
    tensors |= {name: tensor + 0.1 for name, tensor in tensors.items() if name.startswith("model.")}
    checkpoint.save(teacher, tensors, header)
    run = run.model_copy(update={"teachers": (read_origin(teacher),)})
    trainer = Trainer(run, data_set(), tmp_path, ALONE)
    trainer.load_origins([init], [teacher])
    for mine, path in ((trainer.state.model, init), (trainer.state.teachers[0].model, teacher)):
        for name, tensor in checkpoint.load_model(path)[0].state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor), name


def test_several_teachers_answer_with_the_mean_of_their_probabilities() -> None:
    logits = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    mean = torch.stack([each.softmax(dim=1) for each in logits]).mean(dim=0)
    torch.testing.assert_close(mean_answer(logits).softmax(dim=1), mean)
    assert mean_answer(logits[:1]) is logits[0]


def test_each_of_several_teachers_has_a_part_in_the_loss(tmp_path: Path) -> None:
    _, path = taught(tmp_path)
    plain = {"distillation": 1.0, "mix_probability": 0.0, "mixup": 0.0, "cutmix": 0.0, "flip": False, "crop_padding": 0}
    run = run_config(**plain).model_copy(update={"init": read_origin(path)})
    other = shutil.copytree(tmp_path, tmp_path / "other") / "best.safetensors"
    tensors, header = checkpoint.load(other)
    tensors |= {name: tensor + 0.1 for name, tensor in tensors.items() if name.startswith("model.")}
    checkpoint.save(other, tensors, header)
    run = run.model_copy(update={"teachers": (read_origin(path), read_origin(other))})
    trainer = Trainer(run, data_set(), tmp_path, ALONE)
    trainer.load_origins([path], [path, other])
    pixels = trainer.state.preprocess(trainer.train_split.images[:8])
    found = mean_answer([teacher(pixels) for teacher in trainer.state.teachers]).softmax(dim=1)
    with torch.no_grad():
        answers = [checkpoint.load_model(each)[0].eval()(pixels).softmax(dim=1) for each in (path, other)]
    assert not torch.allclose(*answers, atol=1e-3)
    torch.testing.assert_close(found, sum(answers) / 2)
    # The student is the first teacher as it begins: asked alone, that one would teach it nothing.
    student = trainer.state.model(pixels).detach()
    temperature = run.train.distillation_temperature
    softened = [(logits / temperature).softmax(dim=1) for logits in (found.log(), student)]
    expected = temperature**2 * divergence(*softened)
    assert expected > 1e-4
    trainer.one_step(torch.arange(8))
    torch.testing.assert_close(trainer.state.loss_sum, expected, rtol=1e-4, atol=0)


def test_a_run_of_before_there_could_be_several_teachers_is_read(tmp_path: Path) -> None:
    run, path = taught(tmp_path)
    stored = run.model_dump(mode="json")
    del stored["teachers"]
    assert RunConfig.model_validate(stored | {"teacher": None}) == run
    theirs = read_origin(path)
    one = RunConfig.model_validate(stored | {"teacher": theirs.model_dump(mode="json")})
    assert one.teachers == (theirs,)


def test_the_teacher_sees_the_image_before_its_corruption(tmp_path: Path) -> None:
    run, path = taught(tmp_path, corruption=1.0, mixup=0.0, cutmix=0.0)
    clean = run.model_copy(update={"train": run.train.model_copy(update={"corruption": 0.0})})
    seen: dict[str, list[Tensor]] = {}
    for name, each in (("corrupted", run), ("clean", clean)):
        trainer = trainer_of(each, tmp_path / name, path)
        for who, model in (("model", trainer.state.model), ("teacher", trainer.state.teachers[0].model)):
            pixels = seen.setdefault(f"{who}, {name}", [])
            model.register_forward_pre_hook(lambda _, inputs, pixels=pixels: pixels.append(inputs[0]))
        trainer.one_step(torch.arange(8))
    torch.testing.assert_close(seen["teacher, corrupted"], seen["teacher, clean"], rtol=0, atol=0)
    torch.testing.assert_close(seen["model, clean"], seen["teacher, clean"], rtol=0, atol=0)
    assert not torch.allclose(seen["model, corrupted"][0], seen["teacher, corrupted"][0])


def test_a_teacher_of_its_own_depth_and_patches_teaches(tmp_path: Path) -> None:
    _, path = taught(tmp_path)
    run = run_config(DROPOUT | {"num_blocks": 2}, epochs=1, distillation=1.0, **MIXED)
    run = run.model_copy(update={"init": read_origin(path)})
    trainer = trainer_of(run, tmp_path / "run", path)
    assert len(trainer.state.teachers[0].model.transformers[0]) == 1
    trainer.fit()


# --- the command


def test_the_command_asks_the_model_of_init_or_of_teacher_and_wants_one(
    tmp_path: Path, whole: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    common = [*RECIPE, "--data", str(image_dir), "--out", str(run), "--epochs=2"]
    flags = [*common, "--distillation=0.5"]
    for wrong, complaint in (
        (flags, "--distillation 0.5 takes its targets from another model: name one with --teacher, or with --init."),
        ([*common, "--teacher", str(whole)], f"--teacher {whole} teaches nothing without --distillation"),
        ([*flags, "--teacher", str(tmp_path)], f"{tmp_path}: holds no checkpoint; name a run's folder"),
    ):
        assert main(wrong) == 2
        assert complaint in capsys.readouterr().err
        assert not run.exists()
    assert main([*flags, "--init", str(whole), "--max-steps=1"]) == 3
    shutil.copytree(run, tmp_path / "again")
    assert main(["--resume", str(tmp_path / "again")]) == 0
    shutil.rmtree(run)
    # A larger student, which could not begin with the teacher's weights.
    student = [*flags, "--teacher", str(whole), "--dim=20", "--self-heads=5"]
    assert main([*student, "--max-steps=1"]) == 3
    assert main(["--resume", str(run), "--teacher", str(whole)]) == 2
    assert "leave out --teacher" in capsys.readouterr().err
    assert main(["--resume", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["init"] is None
    assert config["teachers"] == [checkpoint.digest(whole / "best.safetensors")]
