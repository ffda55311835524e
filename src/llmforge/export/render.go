// Renders conversations with a Modelfile's TEMPLATE as Ollama does, with Go's own text/template.
//
// Reads {"template": text, "conversations": [[{"role": text, "content": text}]]} from standard input and writes a list
// of {"text": text} or {"error": text}, one for each conversation. What Ollama does is restated here, not copied:
// neighbouring messages of one role become one, and the template is given the messages and all system texts.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

const between = "\n\n" // what Ollama joins texts with

type message struct {
	Role     string `json:"role"`
	Content  string `json:"content"`
	Thinking string `json:"-"`
}

type rendered struct {
	Text  string `json:"text"`
	Error string `json:"error,omitempty"`
}

func join(messages []message) (system string, joined []*message) {
	var systems []string
	for _, next := range messages {
		if next.Role == "system" {
			systems = append(systems, next.Content)
		}
		if count := len(joined); count > 0 && joined[count-1].Role == next.Role && next.Role != "tool" {
			joined[count-1].Content += between + next.Content
			continue
		}
		joined = append(joined, &message{Role: next.Role, Content: next.Content})
	}
	return strings.Join(systems, between), joined
}

func render(parsed *template.Template, messages []message) rendered {
	system, joined := join(messages)
	var text strings.Builder
	values := map[string]any{"System": system, "Messages": joined, "Response": "", "Think": false, "IsThinkSet": false}
	if err := parsed.Execute(&text, values); err != nil {
		return rendered{Error: err.Error()}
	}
	return rendered{Text: text.String()}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	var asked struct {
		Template      string      `json:"template"`
		Conversations [][]message `json:"conversations"`
	}
	fail(json.NewDecoder(os.Stdin).Decode(&asked))
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	fail(err)
	answers := make([]rendered, len(asked.Conversations))
	for index, messages := range asked.Conversations {
		answers[index] = render(parsed, messages)
	}
	fail(json.NewEncoder(os.Stdout).Encode(answers))
}
