import sys

if sys.platform == "win32":  # which has no fcntl and no resource
    sys.exit("EPRLI needs Linux or macOS; on Windows, run it in WSL")
