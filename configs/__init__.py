"""One file for each training stage: `get_config(variant)`. A colon picks a structure, a dot tunes a value."""
