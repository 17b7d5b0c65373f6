"""Everything that memlayers writes and reads again: whole files, checksums, and folders that one process holds."""

from .checksums import file_checksum
from .locks import FolderInUse, holding_file, holding_folder
from .ours import check_ours
from .tensors import check_tensors, read_tensors, write_tensors
from .texts import DamagedFile, read_json, read_text, write_json, write_text
from .together import reading, settle, together
from .whole import make_folder, sync_folder, sync_tree, telling, write_whole

__all__ = [
    "DamagedFile",
    "FolderInUse",
    "check_ours",
    "check_tensors",
    "file_checksum",
    "holding_file",
    "holding_folder",
    "make_folder",
    "read_json",
    "read_tensors",
    "read_text",
    "reading",
    "settle",
    "sync_folder",
    "sync_tree",
    "telling",
    "together",
    "write_json",
    "write_tensors",
    "write_text",
    "write_whole",
]
