"""Our models under the field's evaluation harnesses, one file each. A file imports its harness, which brings its own requirements."""
