"""A client of services that return image embeddings in OpenAI's format, such as infinity-emb."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from PIL import Image
from torch import Tensor

LARGEST_ANSWER = 2**28  # bytes


class EmbeddingsClient:
    """Ask a service for the embeddings of images, which are sent as PNG.

    Args:
        url: of the endpoint, "https://host/embeddings".
        model: the name under which the service knows its model.
        api_key: sent to this address only, and not to one that it redirects to.
        batch_size: images in a request.
        timeout: of a request, in seconds.
    """

    def __init__(
        self, url: str, model: str, api_key: str | None = None, batch_size: int = 16, timeout: float = 60.0
    ) -> None:
        if not url.startswith(("https://", "http://")):
            raise ValueError(f"`url` must start with https:// or http://, but got {url!r}. Give the whole address.")
        self.url = url
        self.model = model
        self.batch_size = batch_size
        self.timeout = timeout
        self._api_key = api_key

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Return the embeddings (B, D) of Pillow images, float32, in their order.

        Raises:
            OSError: the service cannot be reached, or answers with an error.
            ValueError: its answer is not one embedding for each image.
        """
        batch = [images] if isinstance(images, Image.Image) else list(images)
        parts = [self._ask(batch[start : start + self.batch_size]) for start in range(0, len(batch), self.batch_size)]
        if not parts:
            raise ValueError("`images` must be one image at least, but got none. Pass an image or a list of them.")
        if len({part.shape[1] for part in parts}) > 1:
            raise ValueError(
                f"`{self.url}` must answer with embeddings of one length, but got several. Ask its owner."
            )
        return torch.cat(parts)

    def _ask(self, images: Sequence[Image.Image]) -> Tensor:
        content = {"model": self.model, "input": [_as_data_url(image) for image in images], "modality": "image"}
        request = Request(self.url, json.dumps(content).encode(), {"Content-Type": "application/json"})
        if self._api_key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._api_key}")
        try:
            with urlopen(request, timeout=self.timeout) as response:
                body = response.read(LARGEST_ANSWER)
        except HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise OSError(
                f"`{self.url}` must answer with embeddings, but got HTTP {error.code}: {said}. Check the name of the "
                "model, the key, and that the service takes images."
            ) from error
        except (URLError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"`{self.url}` must be reachable, but got: {reason}. Check the address.") from error
        return self._read(body, len(images))

    def _read(self, body: bytes, number: int) -> Tensor:
        try:
            data: list[dict[str, Any]] = json.loads(body)["data"]
            embeddings = {int(entry.get("index", place)): entry["embedding"] for place, entry in enumerate(data)}
            found = torch.tensor([embeddings[index] for index in range(number)], dtype=torch.float32)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`{self.url}` must answer with one embedding for each of {number} images, but got {body[:200]!r}. It "
                "is no endpoint for embeddings in OpenAI's format."
            ) from error
        if found.ndim != 2 or len(embeddings) != number or not bool(found.isfinite().all()):
            raise ValueError(
                f"`{self.url}` must answer with a list of finite numbers for each of {number} images, but got "
                f"{body[:200]!r}. It is no endpoint for embeddings in OpenAI's format."
            )
        return found


def _as_data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
