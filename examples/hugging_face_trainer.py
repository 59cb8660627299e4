"""Hugging Face transformers: the Trainer takes the optimizer beside a constant schedule."""

from __future__ import annotations

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    get_constant_schedule,
    set_seed,
)

from teleport_optim import LearnedTeleportOptimizer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(epochs: int = 8) -> None:
    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images).float().view(-1, 1, 8, 8) / 8 - 1
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels)]
    train, test = data[:1440], data[1440:]
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **shape))
    batch_size = 48
    optimizer = LearnedTeleportOptimizer(model.parameters(), model=model, total_steps=epochs * len(train) // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            settings,
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            # Without a schedule of ours the Trainer adds a linear one, on top of the one that the optimizer has in itself.
            optimizers=(optimizer, get_constant_schedule(optimizer)),
        )
        # The Trainer calls optimizer.eval() before it evaluates and optimizer.train() before the next training step: it measures,
        # and then saves, the average of the iterates. At the end of the run the parameters are there, too.
        trainer.train()
    for entry in trainer.state.log_history:
        if "eval_loss" in entry:
            print(f"epoch {entry['epoch']:.0f}  loss {entry['eval_loss']:.3f}  accuracy {entry['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
