"""Writes a GGUF file anew with all its tensors in float32, for a llama.cpp that computes what `ours.py` does.

python benchmarks/smollm2/gguf_float32.py MODEL.Q4_1.gguf MODEL.F32.gguf
"""

import sys

import gguf
import numpy as np

ARRAY = gguf.GGUFValueType.ARRAY


def main(source: str, target: str):
    """Copies the fields and converts the tensors."""
    old = gguf.GGUFReader(source)
    architecture = old.fields[gguf.Keys.General.ARCHITECTURE].contents()
    new = gguf.GGUFWriter(target, architecture)
    for name, field in old.fields.items():
        if name not in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE) and not name.startswith("GGUF."):
            of = field.types[-1] if field.types[0] == ARRAY else None
            new.add_key_value(name, field.contents(), field.types[0], sub_type=of)
    new.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in old.tensors:
        new.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
