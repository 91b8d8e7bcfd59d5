"""What an attacker does to a loaded model before training it: a table (:mod:`.table`), and a file for each row."""
