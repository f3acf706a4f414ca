"""The command line, which stands above the library and the service. Parses and shows; the work is theirs."""
