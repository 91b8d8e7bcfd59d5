"""The command line: parse, call the API, show. The only room that prints; commands import torch when they run."""
