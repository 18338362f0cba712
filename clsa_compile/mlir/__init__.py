"""MLIR of rewritten programs, by torch-mlir: written into a folder, read back, and run.

from clsa_compile.mlir import Folder, write

write({"decode": program}, "decoder.mlir")  # a torch.export program in which contract ops stand
decode = Folder.read("decoder.mlir").engine("decode")
state |= decode(state)  # caches go in and come out
"""

from clsa_compile.mlir.folder import FORMS, Folder, write

__all__ = ["FORMS", "Folder", "write"]
