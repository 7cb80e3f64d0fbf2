"""A LitServe server of a stock pipeline, in the environment of `make test-servers`: lit_server.py MODEL PORT."""

import base64
import io
import sys

import litserve
from PIL import Image
from transformers import pipeline


class Classifier(litserve.LitAPI):
    """Answers requests as Inference Endpoints do."""

    def setup(self, device):
        self.classify = pipeline("image-classification", model=sys.argv[1], device="cpu")

    def decode_request(self, request):
        image = Image.open(io.BytesIO(base64.b64decode(request["inputs"]))).convert("RGB")
        return image, request.get("parameters") or {}

    def predict(self, asked):
        image, parameters = asked
        return self.classify(image, **parameters)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Classifier(), accelerator="cpu")
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False)
