"""The commands, one small file each: they compose the parts below."""
