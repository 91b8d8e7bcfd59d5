"""The optimizers of an attack: a table (:mod:`.table`), and a file for each that no library has."""
