package main

const criuActionHelp = `criu-action is for CRIU to run.`

const criuActionExamples = `  criu dump`
