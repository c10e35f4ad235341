"""`python -m serving`: one engine behind gRPC, until SIGTERM or SIGINT."""

import sys

from serving.launch.service_process import main

if __name__ == "__main__":
    sys.exit(main())
