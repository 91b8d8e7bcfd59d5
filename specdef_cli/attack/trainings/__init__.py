"""What an attack trains: a table (:mod:`.table`), and a file for each row that needs one."""
