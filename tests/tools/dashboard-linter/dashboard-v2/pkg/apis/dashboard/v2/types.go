// Package v2 stands in for the types of Grafana's v2 dashboards, which module proxies do not carry. The linter
// compiles against them and uses them for v2 dashboards only; the pack's are classic ones, which never get here.
package v2

type DashboardSpec struct {
	Title       string
	Editable    *bool
	Elements    map[string]DashboardElement
	Variables   []DashboardVariableKind
	Annotations []DashboardAnnotationQueryKind
}

type DashboardElement struct {
	PanelKind *struct{ Spec DashboardPanelSpec }
}

type DashboardPanelSpec struct {
	Id          float64
	Title       string
	Description string
	VizConfig   struct {
		Group string
		Spec  struct{ FieldConfig, Options any }
	}
	Data struct {
		Spec struct{ Queries []DashboardPanelQueryKind }
	}
}

type DashboardPanelQueryKind struct {
	Spec struct {
		RefId  string
		Hidden bool
		Query  DashboardDataQueryKind
	}
}

type DashboardDataQueryKind struct {
	Group      string
	Datasource *struct{ Name *string }
	Spec       map[string]any
}

type DashboardVariableRefresh string

const (
	DashboardVariableRefreshOnTimeRangeChanged DashboardVariableRefresh = "onTimeRangeChanged"
	DashboardVariableRefreshOnDashboardLoad    DashboardVariableRefresh = "onDashboardLoad"
)

type variable struct {
	Spec struct {
		Name, PluginId  string
		Label, AllValue *string
		Multi           bool
		Refresh         DashboardVariableRefresh
	}
}

type queryVariable struct {
	Spec struct {
		Name            string
		Label, AllValue *string
		Multi           bool
		Refresh         DashboardVariableRefresh
		Query           DashboardDataQueryKind
	}
}

type textVariable struct {
	Spec struct {
		Name, Query     string
		Label, AllValue *string
		Multi           bool
	}
}

type DashboardVariableKind struct {
	QueryVariableKind      *queryVariable
	DatasourceVariableKind *variable
	CustomVariableKind     *textVariable
	IntervalVariableKind   *textVariable
	ConstantVariableKind   *textVariable
	TextVariableKind       *textVariable
	AdhocVariableKind      *variable
	GroupByVariableKind    *variable
	SwitchVariableKind     *variable
}

type DashboardAnnotationQueryKind struct {
	Spec struct {
		Name  string
		Query DashboardDataQueryKind
	}
}
