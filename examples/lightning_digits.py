"""PyTorch Lightning: configure_optimizers returns the optimizer alone, without a scheduler; a callback shows the average."""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from teleport_optim import LearnedTeleportOptimizer
from teleport_optim.integrations.lightning import AveragedEvaluation


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        outputs = self.network(images)
        self.log_dict(
            {"loss": F.cross_entropy(outputs, labels), "accuracy": (outputs.argmax(1) == labels).float().mean()}
        )

    def on_validation_epoch_end(self) -> None:
        measured = self.trainer.callback_metrics
        print(f"epoch {self.current_epoch + 1}  loss {measured['loss']:.3f}  accuracy {measured['accuracy']:.3f}")

    def configure_optimizers(self) -> LearnedTeleportOptimizer:
        num_steps = int(self.trainer.estimated_stepping_batches)
        # model is what training_step calls: Lightning does not call the LightningModule itself.
        return LearnedTeleportOptimizer(self.parameters(), model=self.network, total_steps=num_steps)


def main(epochs: int = 5) -> None:
    lightning.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels))
    train, test = torch.utils.data.random_split(data, [0.8, 0.2])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    # Validation and checkpoints then take the average of the iterates, which is better than they are before the run's last steps.
    callbacks = [AveragedEvaluation()]
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, callbacks=callbacks, **quiet
    )
    trainer.fit(Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=360))


if __name__ == "__main__":
    main()
