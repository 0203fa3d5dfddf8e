"""fastdiff inside other codebases: one file each, with what one line there puts in the place of its own."""
