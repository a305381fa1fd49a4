"""The commands: one thin module a phase. A process that a driver or launcher started ends with it, from here on."""

from abscot_trl.processes import end_with_launcher

end_with_launcher()
