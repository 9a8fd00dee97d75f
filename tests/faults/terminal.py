"""A terminal with an interactive bash in it, as a user has one."""

import os
import pty
import select
import subprocess
import threading
from pathlib import Path

CTRL_C = b"\x03"
LOOK_S = 0.02
# the shell opens the terminal itself, which makes it the one that controls its session
SHELL = 'exec bash --norc -i <"$0" >"$0" 2>&1'


class Terminal:
    """What appears on it is read until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.text = b""
        self._master, self._slave = pty.openpty()
        # under nohup SIGHUP came ignored, and a run respects that
        default = ["env", "--default-signal=HUP,INT"]
        command = [*default, "bash", "-c", SHELL, os.ttyname(self._slave)]
        self._shell = subprocess.Popen(command, cwd=folder, start_new_session=True)
        self._is_open = True
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while self._is_open:
            if select.select([self._master], [], [], LOOK_S)[0]:
                self.text += os.read(self._master, 4096)

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def close(self) -> None:
        """As when its window is closed: the shell is hung up on, and hangs up on its jobs."""
        if not self._is_open:
            return
        self._is_open = False
        self._reader.join()  # a descriptor that is being read stays open
        os.close(self._slave)
        os.close(self._master)
        self._shell.wait(30)
