"""Load a saved model folder through both entry points, without the metaembed package, and encode queries and pictures.

python examples/reload.py MODEL_FOLDER PICTURES_FOLDER
"""

import json
import sys
from pathlib import Path

sys.modules["metaembed"] = None  # an import of the package now raises: the folder must not need it

import torch
from safetensors.torch import save_file
from sentence_transformers import MultiVectorEncoder
from transformers import AutoModel

folder, pictures = sys.argv[1], Path(sys.argv[2])
texts = json.loads((pictures / "queries.json").read_text())
paths = sorted(pictures.glob("*.png"), key=lambda path: int(path.stem))

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
embeddings = {"queries": model.encode_queries(texts), "documents": model.encode_documents(paths)}
save_file(embeddings, pictures / "AutoModel.safetensors")

encoder = MultiVectorEncoder(folder, trust_remote_code=True)
queries, documents = encoder.encode_query(texts), encoder.encode_document([{"image": str(path)} for path in paths])
embeddings = {"queries": torch.stack(queries), "documents": torch.stack(documents)}
save_file(embeddings, pictures / "MultiVectorEncoder.safetensors")
