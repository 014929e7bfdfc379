"""A model file as a function of pictures: bytes in, the row of an answer out."""

import numpy as np

from convnet import predict
from convnet.bundle import Bundle
from convnet.data import decode
from convnet.data.resize import Resize
from convnet.errors import ConvnetError
from convnet.inputs import Record
from convnet.predict_output import Row


class Classifier:
    """Decodes, classifies and names.

    Attributes:
      classes: k names; of a binary model (negative, positive).
      shape: (h, w, c) of a decoded picture, h = w, c 1 or 3.

    Args:
      bundle: the model.
      name: of the model, for errors.

    Raises:
      ConvnetError: the model does not classify square pictures.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        about = bundle.preprocessing
        shape = tuple(about["input_shape"])
        square = len(shape) == 3 and shape[0] == shape[1] and shape[2] in (1, 3)
        if not square or about["input_dtype"] != "uint8" or not bundle.classes:
            raise ConvnetError(
                f"--model={name}: it takes {about['input_dtype']} {list(shape)} for"
                f" {bundle.task['name']}; want a model that classifies pictures, uint8"
                " [n, n, 1 or 3]"
            )
        self.shape = shape
        self._resize = Resize.of(about)
        self.classes = predict.class_names(bundle.classes, bundle.task["positive"])
        self._network = bundle.predict_fn()

    def decode(self, data: bytes, name: str, max_pixels: int) -> np.ndarray:
        """Returns the pixels uint8 (h, w, c) of a file's bytes.

        Raises:
          DecodeError: it cannot be read, or has more pixels than allowed.
        """
        height, width = decode.shape(data, name)
        if height * width > max_pixels:
            reason = f"{width}x{height} pixels, the limit is {max_pixels:,}"
            raise decode.DecodeError(name, reason)
        size, _, channels = self.shape
        return decode.decode(
            data, name, size=size, resize=self._resize, channels=channels
        )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (b, h, w, c) -> probabilities float32 (b, k); compiles for each b.

        Of a binary model, only the positive class's (b,).
        """
        return np.asarray(self._network(pixels))

    def row(self, path: str, probabilities: np.ndarray, top: int) -> Row:
        """Returns predict's row for one picture, with its `top` most probable classes.

        It has an "error" where the network's answer is not a number.
        """
        record, answers = Record(path), probabilities[None]
        return predict.to_rows([record], answers, self.classes, top, None)[0]
