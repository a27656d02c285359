"""A network of one hidden layer learns to read digits. After every epoch it keeps all that it needs to go on."""

import hashlib
import json
import os
import time

import numpy as np
from sklearn.datasets import load_digits

EPOCHS = 20
HIDDEN = 128
BATCH = 16
MOMENTUM = 0.9
N_TEST = 360


def data():
    """The 1,797 images, 8x8 pixels from 0 to 1, and their digits; the last 360 of a fixed order are for the test."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.data[order] / 16.0, digits.target[order]
    return images[:-N_TEST], labels[:-N_TEST], images[-N_TEST:], labels[-N_TEST:]


class Training:
    """The whole state: weights, their velocities, the generator, and how many epochs are done."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.epoch = 0
        draw = self.generator.normal
        self.weights = {
            "w1": draw(scale=np.sqrt(2 / 64), size=(64, HIDDEN)),
            "b1": np.zeros(HIDDEN),
            "w2": draw(scale=np.sqrt(2 / HIDDEN), size=(HIDDEN, 10)),
            "b2": np.zeros(10),
        }
        self.velocity = {name: np.zeros_like(w) for name, w in self.weights.items()}

    def save(self, folder):
        state = json.dumps({"epoch": self.epoch, "generator": self.generator.bit_generator.state})
        velocity = {f"velocity_{name}": v for name, v in self.velocity.items()}
        np.savez(os.path.join(folder, "training.npz"), state=state, **self.weights, **velocity)

    def load(self, folder):
        with np.load(os.path.join(folder, "training.npz")) as file:
            state = json.loads(str(file["state"]))
            for name in self.weights:
                self.weights[name] = file[name]
                self.velocity[name] = file[f"velocity_{name}"]
        self.epoch = state["epoch"]
        self.generator.bit_generator.state = state["generator"]

    def run_epoch(self, images, labels, learning_rate):
        """One pass over the images, in an order that the generator draws; returns the mean loss."""
        order = self.generator.permutation(len(labels))
        total = 0.0
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            loss, gradients = self.gradients(images[batch], labels[batch])
            total += loss * len(batch)
            for name, gradient in gradients.items():
                self.velocity[name] = MOMENTUM * self.velocity[name] - learning_rate * gradient
                self.weights[name] = self.weights[name] + self.velocity[name]
        self.epoch += 1
        return total / len(order)

    def forward(self, images):
        hidden = np.maximum(images @ self.weights["w1"] + self.weights["b1"], 0.0)
        scores = hidden @ self.weights["w2"] + self.weights["b2"]
        scores -= scores.max(axis=1, keepdims=True)
        likely = np.exp(scores)
        return hidden, likely / likely.sum(axis=1, keepdims=True)

    def gradients(self, images, labels):
        hidden, likely = self.forward(images)
        rows = np.arange(len(labels))
        loss = -np.log(likely[rows, labels]).mean()
        error = likely.copy()
        error[rows, labels] -= 1.0
        error /= len(labels)
        behind = (error @ self.weights["w2"].T) * (hidden > 0)
        return loss, {
            "w1": images.T @ behind,
            "b1": behind.sum(axis=0),
            "w2": hidden.T @ error,
            "b2": error.sum(axis=0),
        }

    def accuracy(self, images, labels):
        return float((self.forward(images)[1].argmax(axis=1) == labels).mean())

    def digest(self):
        return hashlib.sha256(b"".join(self.weights[name].tobytes() for name in sorted(self.weights))).hexdigest()


def train(params, seed, context=None):
    images, labels, test_images, test_labels = data()
    training = Training(seed)
    folder = context.checkpoint_dir if context is not None else None
    if folder and os.listdir(folder):  # an earlier attempt at this replicate came as far as this
        training.load(folder)
    while training.epoch < EPOCHS:
        begin_epoch(training.epoch + 1, params.get("execution_log"), params.get("pause", 0))
        loss = training.run_epoch(images, labels, params["learning_rate"])
        if context is not None:
            training.save(folder)
            context.checkpoint()  # returns when it is stored: from here on, this epoch is never run again
            accuracy = training.accuracy(test_images, test_labels)
            context.report(training.epoch / EPOCHS, epoch=training.epoch, loss=float(loss), accuracy=accuracy)
    return {
        "digest": training.digest(),
        "accuracy": training.accuracy(test_images, test_labels),
        **training.weights,
    }


def begin_epoch(epoch, execution_log, pause):
    """Write to a file that an epoch begins, and take some time, if the parameters ask for it. No result depends on it."""
    if execution_log:
        with open(execution_log, "a") as log:
            log.write(f"{epoch} {os.getpid()}\n")
    if pause:
        time.sleep(pause)


def summarize(replicates):
    accuracies = [r["accuracy"] for r in replicates]
    return {"mean_accuracy": float(np.mean(accuracies)), "worst_accuracy": float(np.min(accuracies))}
